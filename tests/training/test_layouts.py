"""Training on meshes of eight devices is training on one, to float32's rounding, with the collectives it needs."""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from configs.tiny import config as tiny
from dsv3_jax.config import Config
from dsv3_jax.layout import mesh_of
from dsv3_jax.model.functional import skeleton_of
from dsv3_jax.plan.collectives import collectives
from dsv3_jax.plan.hlo import Program
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.state import TrainState, abstract_state, initial_state, state_specs
from dsv3_jax.training.step import StepMetrics, make_train_step
from sharding.mesh import one_device, place_rows, shardings

MODEL = dataclasses.replace(
    tiny.model, vocabulary=64, width=32, layers=3, dense_layers=1, dense_ffn_width=48, heads=4, query_latent=16,
    key_value_latent=16, nope_head_dim=8, rope_head_dim=4, value_head_dim=8, experts=16, experts_per_token=4,
    expert_ffn_width=16, expert_groups=4, groups_per_token=2, mtp_depth=1, initializer_std=0.2, dispatch_factor=1.0,
    remat="none",
)  # fmt: skip
ROWS, SEQUENCE, STEPS = 8, 16, 10
CONFIG = dataclasses.replace(
    tiny,
    model=MODEL,
    data=dataclasses.replace(tiny.data, isolate_documents=True),
    training=dataclasses.replace(
        tiny.training, tokens=2 * STEPS * ROWS * SEQUENCE, batch_size=ROWS, sequence_length=SEQUENCE
    ),
    # An update is not a gradient's sign: where a gradient is next to nothing, so is what rounding makes of it.
    optimizer=dataclasses.replace(tiny.optimizer, learning_rate=1e-2, warmup_steps=2, epsilon=1e-3),
    loss=dataclasses.replace(tiny.loss, balance_weight=0.1),
)
TOLERANCE = 1e-5

LAYOUTS: dict[str, dict[str, int]] = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "expert 8": {"expert": 8},
    "node 2, expert 4": {"node": 2, "expert": 4},
    "tensor 4, data 2": {"tensor": 4, "data": 2},
    "context 4, data 2": {"context": 4, "data": 2},
    "data 2, fsdp 2, expert 2": {"data": 2, "fsdp": 2, "expert": 2},
    "fsdp 2, expert 2, tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "expert 2, context 2, tensor 2": {"expert": 2, "context": 2, "tensor": 2},
}
# Every axis is in one of these; tests/slow/test_layouts.py has the others.
FEW = ("node 2, expert 4", "data 2, fsdp 2, expert 2", "expert 2, context 2, tensor 2")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", FEW)


class Trained(NamedTuple):
    mesh: Mesh
    compiled: Any
    metrics: list[StepMetrics]
    first: TrainState
    """After one step: the first moment is a tenth of the clipped gradient."""
    last: TrainState


def _batches() -> list[Batch]:
    """Documents of several lengths, one row that is half padding, one that is nothing else."""
    random = np.random.default_rng(0)
    places = np.broadcast_to(np.arange(SEQUENCE + 1, dtype=np.int32), (ROWS, SEQUENCE + 1))
    segments = np.ones_like(places)
    segments[1, 8:], segments[2, 5:], segments[5] = 0, 2, 0
    return [
        Batch(random.integers(0, MODEL.vocabulary, places.shape).astype(np.int32), segments, places.copy())
        for _ in range(STEPS)
    ]


def _placed(batch: Batch, mesh: Mesh) -> Batch:
    return jax.tree.map(lambda rows: place_rows({0: rows}, ROWS, mesh), batch)


def _config(sizes: dict[str, int], microbatches: int = 1, remat: str = "none") -> Config:
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(MODEL, remat=remat),
        mesh=dataclasses.replace(CONFIG.mesh, **{"data": 1, **sizes}),
        training=dataclasses.replace(CONFIG.training, microbatches=microbatches),
    )


@functools.cache
def _start() -> TrainState:
    return jax.device_get(initial_state(CONFIG, skeleton_of(MODEL), one_device()))


@functools.cache
def _trained(*sizes: tuple[str, int], microbatches: int = 1, remat: str = "none") -> Trained:
    config = _config(dict(sizes), microbatches, remat)
    skeleton = skeleton_of(config.model)
    devices = jax.devices()[: int(np.prod([size for _, size in sizes], dtype=int))]
    mesh = mesh_of(config, skeleton, devices)
    batches, placed = _batches(), shardings(mesh, state_specs(config, skeleton, mesh))
    state = jax.device_put(_start(), placed)
    lowered = make_train_step(config, skeleton, mesh).lower(
        abstract_state(config, skeleton, mesh), _placed(batches[0], mesh)
    )
    compiled = lowered.compile()
    metrics, first = [], None
    for batch in batches:
        state, of_step = compiled(state, _placed(batch, mesh))
        metrics.append(jax.device_get(of_step))
        first = first or jax.device_get(state)
    return Trained(mesh, compiled, metrics, first, state)


def _assert_close(found: Any, wanted: Any) -> None:
    """Within TOLERANCE of each array's largest element."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(wanted))
    for (path, one), other in zip(leaves, jax.tree.leaves(jax.device_get(found)), strict=True):
        bound = TOLERANCE * np.abs(one).max() if np.size(one) else 0
        np.testing.assert_allclose(other, one, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def test_a_run_starts_from_the_same_bits_on_every_layout():
    config, skeleton = _config({"fsdp": 2, "expert": 2, "tensor": 2}), skeleton_of(MODEL)
    found = initial_state(config, skeleton, mesh_of(config, skeleton))
    for one, other in zip(jax.tree.leaves(_start()), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)


def test_ten_steps_are_those_of_one_device(layout):
    alone, found = _trained(), _trained(*LAYOUTS[layout].items())
    for one, other in zip(alone.metrics, found.metrics, strict=True):
        _assert_close(other.losses, one.losses)
        _assert_close(other.gradient_norm, one.gradient_norm)
        for load, expected in zip(other.loads, one.loads, strict=True):
            np.testing.assert_array_equal(load, expected)
        assert other.dropped == 0 and other.finite
    _assert_close(found.first.optimizer, alone.first.optimizer)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(found.first.router_bias)) > 0
    for state, expected in ((found.first, alone.first), (found.last, alone.last)):
        _assert_close(state.parameters, expected.parameters)
        _assert_close(state.router_bias, expected.router_bias)


def test_microbatches_and_recomputation_on_a_mesh_change_nothing():
    alone, found = _trained(), _trained(("fsdp", 2), ("expert", 2), microbatches=2, remat="block")
    for one, other in zip(alone.metrics, found.metrics, strict=True):
        _assert_close(other.losses, one.losses)
    _assert_close(found.last.parameters, alone.last.parameters)


def test_copies_of_a_piece_are_the_same_bits_on_every_device(layout):
    copies = 0
    for leaf in jax.tree.leaves(_trained(*LAYOUTS[layout].items()).last):
        pieces = collections.defaultdict(list)
        for shard in leaf.addressable_shards:
            pieces[str(shard.index)].append(np.asarray(shard.data).tobytes())
        assert all(len(set(bits)) == 1 for bits in pieces.values())
        copies += sum(len(bits) - 1 for bits in pieces.values())
    assert copies > 0


# What a layout needs, and how often the program has it. Of 30 matrices, 29 are gathered where they are stored in
# pieces, and their gradients scattered; the four of experts have no pieces along the expert axes. The embedding is
# looked up: one gather of what is asked and one all-to-all of what is found, twice, and the way back. A dispatch, of
# which the program has two, gathers the lengths of its queues and agrees on rounds and buckets; it ships rows, weights
# and answers forward, and backward rows, weights and gradients, then the gradients of rows and weights. Along tensor,
# parts of a layer are added up forward, their inputs' gradients backward, and the maximum, sum and label of a softmax.
# Along context each of three attentions gathers its latents, and scatters their gradients; the documents of positions
# are gathered once, and each of two balance losses sums what it counted over a row and the row's length.
COLLECTIVES: dict[str, dict[tuple[str, tuple[str, ...]], int]] = {
    "data 8": {("all-reduce", ("data",)): 2},
    "fsdp 8": {
        ("all-gather", ("fsdp",)): 29 + 2,
        ("all-reduce", ("fsdp",)): 2,
        ("all-to-all", ("fsdp",)): 4,
        ("reduce-scatter", ("fsdp",)): 29,
    },
    "expert 8": {
        ("all-gather", ("expert",)): 25 + 2 + 2,
        ("all-reduce", ("expert",)): 9,
        ("all-to-all", ("expert",)): 2 * (3 + 5) + 4,
        ("reduce-scatter", ("expert",)): 25,
    },
    "node 2, expert 4": {
        ("all-gather", ("expert",)): 25 + 2 + 2,
        ("all-gather", ("node",)): 25 + 2,
        ("all-gather", ("node", "expert")): 2,
        ("all-reduce", ("node", "expert")): 21,
        ("all-to-all", ("expert",)): 2 * (3 + 5),
        # The experts of each row go along with it.
        ("all-to-all", ("node",)): 2 * (4 + 6),
        ("all-to-all", ("node", "expert")): 4,
        ("reduce-scatter", ("expert",)): 25,
        ("reduce-scatter", ("node",)): 25,
    },
    "tensor 4, data 2": {("all-reduce", ("data",)): 2, ("all-reduce", ("tensor",)): 18},
    "data 2, fsdp 2, expert 2": {
        ("all-gather", ("expert",)): 25 + 2,
        ("all-gather", ("fsdp",)): 29,
        ("all-gather", ("fsdp", "expert")): 2,
        ("all-reduce", ("data",)): 1,
        ("all-reduce", ("data", "fsdp", "expert")): 9,
        ("all-reduce", ("fsdp", "expert")): 1,
        ("all-to-all", ("expert",)): 2 * (3 + 5),
        ("all-to-all", ("fsdp", "expert")): 4,
        ("reduce-scatter", ("expert",)): 25,
        ("reduce-scatter", ("fsdp",)): 29,
    },
    "context 4, data 2": {
        ("all-gather", ("context",)): 29 + 2 + 3 + 1,
        ("all-reduce", ("context",)): 2 * 2,
        ("all-reduce", ("data",)): 2,
        ("all-reduce", ("data", "context")): 2,
        ("all-to-all", ("context",)): 4,
        ("reduce-scatter", ("context",)): 29 + 3,
    },
    "fsdp 2, expert 2, tensor 2": {
        ("all-gather", ("expert",)): 25 + 2,
        ("all-gather", ("fsdp",)): 29,
        ("all-gather", ("fsdp", "expert")): 2,
        ("all-reduce", ("fsdp", "expert")): 9,
        ("all-reduce", ("fsdp", "expert", "tensor")): 1,
        ("all-reduce", ("tensor",)): 17,
        ("all-to-all", ("expert",)): 2 * (3 + 5),
        ("all-to-all", ("fsdp", "expert")): 4,
        ("reduce-scatter", ("expert",)): 25,
        ("reduce-scatter", ("fsdp",)): 29,
    },
    "expert 2, context 2, tensor 2": {
        ("all-gather", ("context",)): 29 + 3 + 1,
        ("all-gather", ("expert",)): 25 + 2,
        ("all-gather", ("expert", "context")): 2,
        ("all-reduce", ("context",)): 3,
        ("all-reduce", ("expert",)): 1,
        ("all-reduce", ("expert", "context")): 9,
        ("all-reduce", ("expert", "context", "tensor")): 1,
        ("all-reduce", ("tensor",)): 17,
        ("all-to-all", ("expert",)): 2 * (3 + 5),
        ("all-to-all", ("expert", "context")): 4,
        ("reduce-scatter", ("context",)): 29 + 3,
        ("reduce-scatter", ("expert",)): 25,
    },
}


def test_the_compiled_step_has_the_collectives_the_layout_needs_and_no_other(layout):
    """A reshard that XLA put in, or a gather where a piece would do, is one too many."""
    trained = _trained(*LAYOUTS[layout].items())
    found = collections.Counter(
        (each.kind, each.axes) for each in collectives(Program(trained.compiled.as_text()), trained.mesh)
    )
    assert found == COLLECTIVES[layout]


def test_a_checkpoint_of_one_layout_is_read_on_another_value_for_value(tmp_path):
    """8 devices -> 4 -> 1 -> 8: pieces over experts, over both, whole, and over fsdp."""
    skeleton, wanted = skeleton_of(MODEL), jax.device_get(_trained(*LAYOUTS["node 2, expert 4"].items()).last)
    state = _trained(*LAYOUTS["node 2, expert 4"].items()).last
    for step, sizes in enumerate([{"fsdp": 2, "expert": 2}, {}, {"fsdp": 8}], start=1):
        config = _config(sizes)
        checkpoints = Checkpoints(tmp_path, config, "{}")
        checkpoints.save(step, state, {})
        checkpoints.close()
        devices = jax.devices()[: int(np.prod(list(sizes.values()), dtype=int))]
        mesh = mesh_of(config, skeleton, devices)
        restored = Checkpoints(tmp_path, config, "{}").restore_latest(abstract_state(config, skeleton, mesh))
        assert restored is not None and restored.step == step
        state = restored.state
        placed = shardings(mesh, state_specs(config, skeleton, mesh))
        for leaf, place, expected in zip(*map(jax.tree.leaves, (state, placed, wanted)), strict=True):
            assert leaf.sharding == place
            np.testing.assert_array_equal(leaf, expected)
