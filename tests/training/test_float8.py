"""Training in FP8: what is kept for the backward pass, and that runs resume, load and export as any other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train
from configs.tiny import config as tiny
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.config_checks import check
from dsv3_jax.convert.exporting import export_checkpoint
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.layout import describe
from dsv3_jax.loading import load
from dsv3_jax.model.block import Block
from dsv3_jax.model.functional import skeleton_of, take_apart
from dsv3_jax.model.layers import recomputed
from dsv3_jax.model.rope import rotation
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.state import abstract_state, initial_state
from dsv3_jax.training.step import make_train_step
from sharding.mesh import LayoutError, one_device

ROWS, SEQUENCE = 2, 16
TOKENIZER = train_tokenizer(["some words " * 50], 300).to_str()
POSITIONS = 20
"""A size that no dim of a parameter has."""


@pytest.fixture(scope="module")
def config(tiny_model) -> Config:
    """One MoE block and an MTP module."""
    model = tiny_model(layers=1, dense_layers=0, precision="fp8", vocabulary=300)
    training = dataclasses.replace(tiny.training, tokens=100 * 32, batch_size=ROWS, sequence_length=SEQUENCE)
    return dataclasses.replace(tiny, model=model, training=training)


def test_a_run_goes_on_bit_for_bit_and_is_loaded_and_exported_as_any_other(config, tmp_path):
    skeleton, mesh = skeleton_of(config.model), one_device()
    random = np.random.default_rng(0)
    places = np.broadcast_to(np.arange(SEQUENCE + 1, dtype=np.int32), (ROWS, SEQUENCE + 1))
    batches = [
        Batch(random.integers(0, 48, places.shape).astype(np.int32), np.ones_like(places), places) for _ in "abc"
    ]
    step = make_train_step(config, skeleton, mesh)
    step = step.lower(abstract_state(config, skeleton, mesh), batches[0]).compile()
    state, losses = initial_state(config, skeleton, mesh), []
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", config, TOKENIZER)
    for number, batch in enumerate(batches, start=1):
        state, metrics = step(state, batch)
        losses.append(float(metrics.losses.next_token))
        if number != 2:
            continue
        checkpoints.save(number, state, {})
        checkpoints.wait()
        restored = checkpoints.restore_latest(abstract_state(config, skeleton, mesh))
    checkpoints.close()
    assert abs(losses[0] - np.log(300)) < 1 and metrics.finite
    assert {leaf.dtype for leaf in jax.tree.leaves(state.parameters)} == {jnp.dtype("float32")}
    moments = state.optimizer[0].mu, state.optimizer[0].nu
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("bfloat16")}
    _assert_same_bits(step(restored.state, batches[-1])[0], state)

    model, loaded, _ = load(tmp_path / "run")
    assert loaded.model.precision == "bfloat16" and model.embedding.get_value().dtype == jnp.bfloat16
    export_checkpoint(tmp_path / "run", tmp_path / "exported")
    exported, _, _ = load(tmp_path / "exported", dtype="float32")
    kept = Checkpoints(tmp_path / "run" / "checkpoints", config, TOKENIZER).restore_latest(
        abstract_state(config, skeleton, mesh)
    )
    _assert_same_bits(take_apart(exported)[0], kept.state.parameters)


def _assert_same_bits(left: Any, right: Any) -> None:
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def _kept(model: Any, **changes: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Type and shape of what the backward pass of one dense block has of the forward pass, parameters left out."""
    model = dataclasses.replace(model, **changes)
    block = nnx.eval_shape(lambda: Block(model, nnx.Rngs(0), dense=True))
    structure, state = nnx.split(block)
    by, valid = rotation(model, jnp.arange(POSITIONS)[None]), jnp.ones((ROWS, POSITIONS), bool)

    def apply(state: nnx.State, x_BSD: Any):
        return nnx.merge(structure, state)(x_BSD, by, None, valid)[0]

    x_BSD = jax.ShapeDtypeStruct((ROWS, POSITIONS, model.width), jnp.dtype(model.dtype))
    transpose = jax.eval_shape(lambda *inputs: jax.vjp(recomputed(apply, model.recomputed), *inputs)[1], state, x_BSD)
    leaves = [leaf for leaf in jax.tree.leaves(transpose) if {POSITIONS, ROWS * POSITIONS}.intersection(leaf.shape)]
    return sorted((leaf.dtype.name, leaf.shape) for leaf in leaves)


def test_activations_are_kept_in_fp8_and_attentions_output_in_twelve_bits(tiny_model):
    changes = {"dense_ffn_width": 256, "width": 128, "heads": 2, "value_head_dim": 44}
    both_norms_inputs = [("bfloat16", (2, 20, 128))] * 2
    both_latents = [("bfloat16", (2, 20, 12)), ("bfloat16", (2, 20, 16 + 8))]
    softmax, rotations = [("float32", (2, 2, 20))], [("float32", (1, 20, 4))] * 2
    attended = [("uint8", (2, 2, 20, 44 + 22)), ("float32", (2, 2, 20, 1))]
    swiglu_input = [("float8_e4m3fn", (40, 2 * 256)), ("float32", (40, 2 * 2))]
    wanted = both_norms_inputs + both_latents + softmax + attended + rotations + swiglu_input
    found = _kept(tiny_model(precision="fp8"), **changes)
    assert found == sorted(wanted)
    # The recipe has no more than this, whatever the configuration says; it may have less.
    assert found == _kept(tiny_model(precision="fp8", remat="up_projections"), **changes)
    assert _kept(tiny_model(precision="fp8", remat="block"), **changes) == sorted(both_norms_inputs[:1] + rotations)


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        (
            {},
            4,
            "parameter moe_blocks.attention.output: mesh.tensor=4 cuts its 'heads', 256 numbers, within a tile of 128, "
            "which model.precision=fp8 cannot; mesh.tensor may be 1, 2",
        ),
        (
            {"expert_ffn_width": 128},
            2,
            "moe_blocks.feed_forward.experts.down: mesh.tensor=2 cuts its 'expert_ffn', 128",
        ),
        ({}, 2, None),
        ({"expert_ffn_width": 128, "precision": "bfloat16"}, 2, None),
    ],
)
def test_a_mesh_that_cuts_tiles_is_refused(tiny_model, changes, tensor, message):
    heads = {"heads": 8, "nope_head_dim": 32, "rope_head_dim": 32, "value_head_dim": 32}
    whole = {"layers": 1, "dense_layers": 0, "mtp_depth": 0, "vocabulary": 64, "expert_ffn_width": 256}
    model = tiny_model(**{"precision": "fp8", **heads, **whole, **changes})
    config = dataclasses.replace(tiny, model=model, mesh=dataclasses.replace(tiny.mesh, data=1, tensor=tensor))
    if message is None:
        assert "mesh: tensor" in describe(config, skeleton_of(model), 1)
        return
    with pytest.raises(LayoutError) as caught:
        describe(config, skeleton_of(model), 1)
    assert message in str(caught.value)


def test_options_of_fp8_need_it(tiny_model):
    for name, value in (("float8_scales", "power_of_two"), ("float8_tiles", "tensor")):
        check(dataclasses.replace(tiny, model=tiny_model(precision="fp8", **{name: value})))
        with pytest.raises(ConfigError, match=f"^model.{name}={value} means nothing with model.precision=float32"):
            check(dataclasses.replace(tiny, model=tiny_model(**{name: value})))


def test_a_run_says_whether_its_devices_multiply_fp8_and_what_happens_if_not(config, capsys):
    for kind, said in {
        "cpu": "cpu has no products of FP8 here, only TPU7x and Hopper GPUs have. Numbers are rounded to FP8 as the",
        "TPU v6 lite": "TPU v6 lite has no products of FP8 here",
        "NVIDIA A100-SXM4-80GB": "NVIDIA A100-SXM4-80GB has no products of FP8 here",
        "TPU7x": "TPU7x multiplies FP8, in all three products",
        "NVIDIA H100 80GB HBM3": "NVIDIA H100 80GB HBM3 multiplies FP8",
        "NVIDIA H200": "NVIDIA H200 multiplies FP8",
    }.items():
        train.note_float8(config, kind)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"model.precision=fp8: {said}")
    train.note_float8(tiny, "cpu")
    assert capsys.readouterr().err == ""
