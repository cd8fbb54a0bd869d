"""What a plan says: of a program that does not fit, what would; in words and as JSON."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs.v3_671b import config as v3_671b
from dsv3_jax.command_line import load_config
from dsv3_jax.errors import ArgumentError
from dsv3_jax.model.functional import skeleton_of, to_run
from dsv3_jax.plan.__main__ import parse_plan
from dsv3_jax.plan.chips import CHIPS, GIB
from dsv3_jax.plan.collectives import Collective
from dsv3_jax.plan.liveness import Array
from dsv3_jax.plan.memory import Memory, bytes_by_part
from dsv3_jax.plan.plan import Plan, Work, summary, what_would_fit
from dsv3_jax.plan.programs import traced_decode, traced_prefill
from dsv3_jax.plan.report import report
from dsv3_jax.plan.roofline import Times
from dsv3_jax.plan.topology import Topology
from dsv3_jax.training.flops import forward_flops, model_flops_per_token, parameter_counts
from dsv3_jax.training.state import abstract_state
from sharding.mesh import one_device

ROOT = Path(__file__).parents[2]


def _plan(needed: float, microbatches: int = 120, remat: str = "block", fits: bool = False) -> Plan:
    config = dataclasses.replace(
        v3_671b,
        model=dataclasses.replace(v3_671b.model, remat=remat),
        training=dataclasses.replace(v3_671b.training, microbatches=microbatches),
    )
    mesh = SimpleNamespace(shape={"fsdp": 2, "expert": 64}, axis_names=("fsdp", "expert"), size=128)
    machine = Topology("v5p:4x4x8", CHIPS["v5p"], (4, 4, 8), 1, [None] * 128)
    work = Work(config, "train", config.training.batch_size, 4096, mesh, machine)
    state = {"step": 4.0, "parameters": 20.0 * GIB, "router_bias": 1e5, "optimizer": 20.0 * GIB}
    if not fits:
        return Plan(work, state, needed, None, [], {"bfloat16": 1e15}, None, [], None, 1e15, None)
    return Plan(
        work, state, needed, Memory(40 * GIB, 37 * GIB, needed), [Array(2.0 * GIB, "f32[4]", "mul")],
        {"bfloat16": 1.4e15}, 6e12, [Collective("all-gather", ("fsdp",), 58, 1e6)], Times(3.0, 2.2, 1.0, 0.0), 1e15, 99,
    )  # fmt: skip


def test_what_does_not_fit_says_what_would_the_cheapest_first():
    plan = _plan(needed=130 * GIB, microbatches=1, remat="none")
    assert not plan.fits
    microbatches, remat, chips = what_would_fit(plan)
    assert "--training.microbatches=120: one row a device at a time instead of 120" in microbatches
    assert "--model.remat=block" in remat
    # State and gradients, 60 GiB: a quarter of them leaves 130 - 45 GiB, half would leave 100.
    assert "512 chips with --mesh.fsdp=8: about 85 GiB" in chips


def test_where_one_row_is_too_much_only_more_chips_help():
    assert [option.partition(" with")[0] for option in what_would_fit(_plan(needed=120 * GIB))] == ["256 chips"]
    assert what_would_fit(_plan(needed=300 * GIB)) == []
    # 2048 pieces would do, but a latent of 512 cannot be cut into so many.
    assert what_would_fit(_plan(needed=148 * GIB)) == []


def test_the_report_of_a_plan_that_fits_names_its_bound_and_of_one_that_does_not_what_would():
    text = report(_plan(77 * GIB, fits=True))
    for part in (
        "train on v5p:4x4x8, 128 chips: mesh fsdp 2 x expert 64; 15360 rows of 4096 tokens in 120 microbatches",
        "77.00 at the peak of 95.00: fits",
        "20.00  parameters",
        "2.00  f32[4]  mul",
        "0.058      58  all-gather over fsdp (1 in the program)",
        "1.40 times the model's own 1e+15",
        "3,000 ms  matrix products  <- the bound",
        "at most 73% model-FLOP utilisation",
    ):
        assert part in text, part
    text = report(_plan(130 * GIB))
    assert "130.00 at the peak of 95.00: DOES NOT FIT" in text and "would fit:\n  512 chips" in text


@pytest.mark.parametrize("fits", [True, False])
def test_json_is_json(fits):
    read = json.loads(json.dumps(summary(_plan(77 * GIB if fits else 130 * GIB, fits=fits)), allow_nan=False))
    assert read["fits"] is fits and bool(read["would_fit"]) is not fits
    assert read["mesh"] == {"fsdp": 2, "expert": 64} and read["state"]["parameters"] == 20 * GIB


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--config=tiny"], "--topology=CHIP:SIDES is missing"),
        (["--config=tiny", "--topolgy=v5p:4x4x8"], "did you mean --topology?"),
        (["--config=tiny", "--topology=v5p:4x4x8", "--rows=4"], "--rows=4 is for --program=prefill and decode"),
        (["--config=tiny", "--topology=v5p:4x4x8", "--program=decode", "--rows=0"], "--rows=0 must be at least 1"),
        (["--config=tiny", "--topology=v5p:4x4x8", "--program=run"], "expected one of train, prefill, decode"),
    ],
)
def test_a_mistake_is_one_line(argv, part):
    with pytest.raises(ArgumentError) as caught:
        parse_plan(argv)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_mesh_that_does_not_fit_the_machine_ends_with_2_before_anything_is_compiled():
    command = [sys.executable, "-m", "dsv3_jax.plan", "--config=tiny", "--topology=v9:2x2"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: --topology=v9:2x2: there is no chip v9")
    assert ended.stderr.count("\n") == 1 and not ended.stdout


def test_bytes_of_the_state_are_those_of_its_arrays(tiny_model):
    config = dataclasses.replace(load_config("tiny"), model=tiny_model())
    state = abstract_state(config, skeleton_of(config.model), one_device())
    found, numbers = bytes_by_part(state), parameter_counts(config.model)
    biases = (config.model.moe_layers + config.model.mtp_depth) * config.model.experts
    assert found["router_bias"] == 4 * biases
    assert found["parameters"] == 4 * (numbers.main + numbers.mtp - biases)
    assert found["optimizer"] == 2 * found["parameters"] + 8  # and the counts of two schedules


@pytest.mark.parametrize("length", [1, 17])
def test_forward_flops_are_a_third_of_trainings_on_one_row_and_decodes_of_a_row_grow_with_the_cache(tiny_model, length):
    model = tiny_model(mtp_depth=0)
    head = model.width * model.vocabulary
    of_last = forward_flops(model, length, decode=False)
    assert of_last + 2 * (length - 1) * head == pytest.approx(model_flops_per_token(model, length) * length / 3)
    # One position more: its logit and its value, absorbed, for every head and layer.
    more = forward_flops(model, length + 1, decode=True) - forward_flops(model, length, decode=True)
    assert more == 2 * model.layers * model.heads * (2 * model.key_value_latent + model.rope_head_dim)


@pytest.mark.parametrize("trace", [traced_prefill, traced_decode])
def test_prefill_and_decode_on_a_mesh_are_those_of_one_device(trace, tiny_model, mesh_with):
    """The programs that are planned, run here."""
    model = tiny_model(width=32, heads=4, query_latent=16)
    config = dataclasses.replace(load_config("tiny"), model=model)
    skeleton, rows, positions = to_run(skeleton_of(model)), 8, 6
    random = np.random.default_rng(0)
    tokens = random.integers(0, model.vocabulary, (rows, positions if trace is traced_prefill else 1)).astype(np.int32)

    def drawn(given):
        draws = np.random.default_rng(1)
        return jax.tree.map(lambda leaf: draws.normal(0, 0.3, leaf.shape).astype(leaf.dtype), given)

    found = []
    for mesh in (one_device(), mesh_with(fsdp=2, expert=4)):
        traced, given = trace(config, skeleton, mesh, rows, positions)
        parameters, cache = drawn(given)
        found.append(jax.device_get(traced.lower().compile()(parameters, tokens, cache)))
    one, other = found
    np.testing.assert_array_equal(one[0], other[0])
    for layer, same in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_allclose(layer, same, rtol=1e-5, atol=1e-5)
