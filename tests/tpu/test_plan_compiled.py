"""`python -m dsv3_jax.plan` as it is run: real programs compiled for machines that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY = ("--config=tiny", "--model.precision=bfloat16")


def _start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dsv3_jax.plan", *arguments]
    # As a user has it: what this process set for its own jax is not passed on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "TPU_"))}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _ended(process: subprocess.Popen, code: int = 0) -> str:
    out, errors = process.communicate(timeout=1200)
    assert process.returncode == code, errors
    return out


def _planned(*arguments: str, code: int = 0) -> dict[str, Any]:
    return json.loads(_ended(_start(*arguments, "--json"), code))


def _sent(plan: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(each["kind"], "+".join(each["axes"])): each["bytes_sent"] for each in plan["collectives"]}


def test_a_training_step_has_the_collectives_of_its_layout_and_no_all_reduce_of_a_gradient():
    plan = _planned(*TINY, "--topology=v5e:2x4", "--mesh.fsdp=2", "--mesh.expert=4")
    assert plan["fits"] and plan["chips"] == 8 and plan["mesh"] == {"fsdp": 2, "expert": 4}
    sent = _sent(plan)
    for kind in ("ragged-all-to-all", "all-gather", "reduce-scatter"):
        assert sent[kind, "expert"] > 0
    assert sent["reduce-scatter", "fsdp"] > 0
    # The gradients of norms, some statistics and agreements are all that is summed whole.
    assert sum(size for (kind, _), size in sent.items() if kind == "all-reduce") < 1e-2 * sum(sent.values())
    assert plan["state"]["parameters"] < plan["memory"]["arguments"] < plan["memory_needed"] < plan["memory_capacity"]
    # Nothing is recomputed: what is above the model's own is attention's upper triangle and its second logits.
    assert 1 < sum(plan["flops"].values()) / plan["model_flops"] < 1.3
    assert plan["seconds"][plan["bound"]] == max(plan["seconds"].values()) > 0
    assert plan["at_peak"][0]["bytes"] <= plan["memory_needed"]


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_chip_takes_the_kernels_and_the_dispatch(topology):
    plan = _planned(*TINY, f"--topology={topology}", "--mesh.expert=4")
    assert plan["fits"] and ("ragged-all-to-all", "expert") in _sent(plan)
    assert plan["chips"] == 4 and plan["mesh"].get("data", 1) == (2 if topology.startswith("tpu7x") else 1)


def test_prefill_and_decode_and_two_programs_at_a_time():
    options = (*TINY, "--topology=v5e:2x2", "--mesh.expert=4", "--positions=256", "--json")
    running = {kind: _start(*options, f"--program={kind}") for kind in ("prefill", "decode")}
    plans = {kind: json.loads(_ended(process)) for kind, process in running.items()}
    for kind, plan in plans.items():
        assert plan["fits"] and plan["program"] == kind and plan["rows"] == 4
        # One device: two bytes a number of one row in a cache of 4 layers.
        assert plan["state"]["cache"] == 2 * 4 * 256 * (48 + 16)
    assert plans["decode"]["model_flops"] < plans["prefill"]["model_flops"] / 100


@pytest.mark.parametrize("weights", ["compute", "float8"])
def test_decode_of_v3_is_bound_by_what_it_reads_not_by_what_devices_tell_each_other(weights):
    """Five of its layers: nothing of the model is gathered, and nothing is read twice."""
    options = ("--program=decode", "--topology=v6e:4x8", "--mesh.expert=4", "--mesh.tensor=8", "--rows=64")
    shape = ("--model.layers=5", "--model.mtp_depth=0", f"--weights={weights}")
    plan = _planned("--config=v3_671b", *options, *shape)
    assert plan["fits"] and plan["bound"] == "memory" and plan["rows"] == 64
    assert sum(size for (kind, _), size in _sent(plan).items() if kind == "all-gather") < 2e-2 * plan["memory_traffic"]
    # All there is, once, but for the first expansions, which only prefill uses, and all but some rows of the embedding.
    held = plan["state"]["parameters"] + plan["state"]["cache"]
    assert plan["memory_traffic"] < 1.3 * held


def test_between_slices_gradients_cross_the_network():
    plan = _planned(*TINY, "--topology=v5p:2x2x1", "--slices=2", "--mesh.data=2", "--mesh.fsdp=4")
    assert plan["chips"] == 8 and plan["seconds"]["network"] > 0
    assert _sent(plan)["all-reduce", "data"] > plan["state"]["parameters"] / 2


def test_what_does_not_fit_ends_with_1_and_says_what_would():
    process = _start("--config=v2_lite", "--topology=v5e:2x4", "--mesh.fsdp=8", "--training.batch_size=64")
    report = _ended(process, code=1)
    assert "DOES NOT FIT" in report and "--training.microbatches=8" in report and "chips with --mesh.fsdp=" in report


def test_v3_trains_on_128_chips_of_v5p_losing_no_token():
    """Float32 parameters and gradients, bfloat16 moments, MTP, rows of 4096: within the 95 GiB of a chip."""
    plan = _planned(
        "--config=v3_671b", "--topology=v5p:4x4x8", "--mesh.fsdp=2", "--mesh.expert=64", "--training.batch_size=128"
    )
    assert plan["fits"] and plan["memory_needed"] < 78 * 2**30
    assert plan["state"]["parameters"] > 4 * 671e9 / 128 and plan["state"]["optimizer"] > 4 * 671e9 / 128


CACHE_TYPES = """
from dsv3_jax.plan.topology import set_up_libtpu, topology
set_up_libtpu()
import dataclasses
import jax
from configs.tiny import config as tiny
from dsv3_jax.model.functional import skeleton_of
from dsv3_jax.plan.plan import plan_work
from dsv3_jax.plan.programs import traced_decode
model = dataclasses.replace(tiny.model, precision="bfloat16")
config = dataclasses.replace(tiny, model=model)
work = plan_work(config, topology("v5e:2x4"), "decode", 8, 64)
_, given = traced_decode(config, skeleton_of(model), work.mesh, 8, 64)
print(*{leaf.dtype.name for leaf in jax.tree.leaves(given.cache)})
"""


def test_a_cache_is_held_as_its_chips_hold_it_and_not_as_this_cpu_does():
    found = subprocess.run([sys.executable, "-c", CACHE_TYPES], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.split() == ["bfloat16"], found.stderr
