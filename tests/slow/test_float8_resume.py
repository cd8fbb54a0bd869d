"""A run in FP8 on eight devices is saved, goes on there or elsewhere, and is exported in FP8."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from configs.tiny import config as tiny
from dsv3_jax.config import Config
from dsv3_jax.convert.exporting import export_checkpoint
from dsv3_jax.layout import mesh_of
from dsv3_jax.loading import load
from dsv3_jax.model.functional import skeleton_of
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.state import TrainState, abstract_state, initial_state
from dsv3_jax.training.step import StepMetrics, make_train_step
from sharding.mesh import place_rows
from tests.conftest import TINY
from tests.reference import float8 as reference
from tests.training.test_float8 import TOKENIZER, _assert_same_bits

ROWS, SEQUENCE = 8, 16
MODEL = dataclasses.replace(
    TINY, layers=1, dense_layers=0, mtp_depth=0, precision="fp8", vocabulary=300, width=40, query_latent=16
)


class Run(NamedTuple):
    """Two steps."""

    folder: Path
    saved: TrainState
    """After the first, as the checkpoint in the folder has it."""
    last: TrainState
    metrics: StepMetrics
    """Of the second."""
    continued: TrainState
    """After the second, taken again from the checkpoint."""


def _config(**sizes: int) -> Config:
    training = dataclasses.replace(
        tiny.training, tokens=100 * ROWS * SEQUENCE, batch_size=ROWS, sequence_length=SEQUENCE
    )
    return dataclasses.replace(
        tiny, model=MODEL, training=training, mesh=dataclasses.replace(tiny.mesh, **{"data": 1, **sizes})
    )


def _compiled(config: Config, mesh: Mesh) -> tuple[Any, list[Batch]]:
    """The training step, and two batches."""
    skeleton = skeleton_of(config.model)
    places = np.broadcast_to(np.arange(SEQUENCE + 1, dtype=np.int32), (ROWS, SEQUENCE + 1))
    batches = [
        Batch(*(place_rows({0: rows}, ROWS, mesh) for rows in (tokens, np.ones_like(tokens), places)))
        for tokens in np.random.default_rng(0).integers(0, 48, (2, *places.shape)).astype(np.int32)
    ]
    lowered = make_train_step(config, skeleton, mesh).lower(abstract_state(config, skeleton, mesh), batches[0])
    # XLA:CPU otherwise leaves out roundings to bfloat16 between what it fuses, which depends on the layout.
    return lowered.compile({"xla_allow_excess_precision": False}), batches


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    config, skeleton = _config(fsdp=2, expert=4), skeleton_of(MODEL)
    folder, mesh = tmp_path_factory.mktemp("run"), mesh_of(config, skeleton)
    step, batches = _compiled(config, mesh)
    state, _ = step(initial_state(config, skeleton, mesh), batches[0])
    checkpoints = Checkpoints(folder / "checkpoints", config, TOKENIZER)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    saved = jax.device_get(state)
    last, metrics = jax.device_get(step(state, batches[1]))
    restored = checkpoints.restore_latest(abstract_state(config, skeleton, mesh))
    checkpoints.close()
    return Run(folder, saved, last, metrics, jax.device_get(step(restored.state, batches[1])[0]))


def test_a_run_of_eight_devices_goes_on_bit_for_bit(run):
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.saved.optimizer[0].mu)} == {"bfloat16"}
    _assert_same_bits(run.continued, run.last)


def test_it_goes_on_on_another_mesh(run):
    config, skeleton = _config(expert=8), skeleton_of(MODEL)
    mesh = mesh_of(config, skeleton)
    abstract = abstract_state(config, skeleton, mesh)
    restored = Checkpoints(run.folder / "checkpoints", config, TOKENIZER).restore_latest(abstract).state
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding
    _assert_same_bits(restored, run.saved)
    step, batches = _compiled(config, mesh)
    _, found = jax.device_get(step(restored, batches[1]))
    # A token is computed as on the other mesh: what differs is the order of float32's sums.
    np.testing.assert_allclose(found.losses.next_token, run.metrics.losses.next_token, rtol=1e-6)
    np.testing.assert_allclose(found.gradient_norm, run.metrics.gradient_norm, rtol=1e-3)
    for counted, wanted in zip(found.loads, run.metrics.loads, strict=True):
        np.testing.assert_array_equal(counted, wanted)


def test_the_blocks_that_are_exported_are_those_that_training_multiplied_with(run):
    export_checkpoint(run.folder, run.folder / "exported", dtype="fp8")
    exported, _, _ = load(run.folder / "exported", dtype="float32")
    for name, parts in {"down": lambda matrix: matrix, "gate_up": lambda matrix: matrix.swapaxes(0, 1)}.items():
        masters = run.saved.parameters["moe_blocks"]["feed_forward"]["experts"][name][0]
        found = getattr(exported.moe_blocks.feed_forward.experts, name)[0]
        for matrix, other in zip(map(parts, masters), map(parts, np.asarray(found)), strict=True):
            # Gate and up are two matrices.
            for one, exported_one in zip(*(x.reshape(-1, *x.shape[-2:]) for x in (matrix, other)), strict=True):
                # A scale is amax / 448 or amax times the reciprocal.
                np.testing.assert_allclose(exported_one, reference.as_blocks(one), rtol=3e-7, atol=0)
