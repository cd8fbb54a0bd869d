"""One optimizer step: any split of the batch gives it, the router bias moves once, a bad step leaves no trace."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import config as tiny
from dsv3_jax.config import Config
from dsv3_jax.model.functional import abstract_trees, skeleton_of
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.state import TrainState, abstract_state
from dsv3_jax.training.step import StepMetrics, make_train_step, update_router_biases
from sharding.mesh import one_device

MODEL = dataclasses.replace(
    tiny.model, vocabulary=50, width=16, layers=2, dense_layers=0, heads=2, query_latent=None, key_value_latent=8,
    nope_head_dim=4, rope_head_dim=4, value_head_dim=4, experts=4, experts_per_token=2, shared_experts=0,
    expert_ffn_width=8, expert_groups=1, groups_per_token=1, mtp_depth=1,
)  # fmt: skip
STEPS = 148
SPEED = np.float32(0.001)
RATE = 50.0
"""Of the first step."""


@cache
def _config(microbatches: int) -> Config:
    return dataclasses.replace(
        tiny,
        model=MODEL,
        data=dataclasses.replace(tiny.data, isolate_documents=True),
        training=dataclasses.replace(
            tiny.training, tokens=STEPS * 4 * 12, batch_size=4, sequence_length=12, microbatches=microbatches
        ),
        loss=dataclasses.replace(tiny.loss, bias_speed=float(SPEED)),
        # With these a first update is rate * g / (|g| + 1): `_gradients` reads g back from the parameters.
        optimizer=dataclasses.replace(
            tiny.optimizer, learning_rate=2 * RATE, warmup_steps=2, epsilon=1.0, weight_decay=0.0, clip_norm=1e9
        ),
    )


SKELETON, MESH = skeleton_of(MODEL), one_device()


def _abstract_state() -> TrainState:
    return abstract_state(_config(1), SKELETON, MESH)


@cache
def _step(microbatches: int) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    return make_train_step(_config(microbatches), SKELETON, MESH).lower(_abstract_state(), _batch()).compile()


def _state(step: int = 0) -> TrainState:
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.2 * random.normal(size=leaf.shape), leaf.dtype)

    parameters, router_bias = jax.tree.map(draw, abstract_trees(SKELETON))
    fresh = _abstract_state().optimizer
    optimizer = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), fresh)
    return TrainState(jnp.int32(step), parameters, router_bias, optimizer)


def _batch() -> Batch:
    """A full row, two documents, a row that is mostly padding, a row of nothing else."""
    random = np.random.default_rng(1)
    segments = np.array([[1] * 13, [1] * 4 + [2] * 9, [1] * 3 + [0] * 10, [0] * 13], np.int32)
    positions = np.tile(np.arange(13, dtype=np.int32), (4, 1))
    return Batch(random.integers(0, 50, (4, 13)).astype(np.int32), segments, positions)


@cache
def _stepped(microbatches: int) -> tuple[TrainState, StepMetrics]:
    return _step(microbatches)(_state(), _batch())


def _assert_same_bits(left: Any, right: Any) -> None:
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def _assert_close(left: Any, right: Any, share: float) -> None:
    """Equal within this share of each array's largest element."""
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=share * np.abs(one).max() + 1e-12)


def _gradients(after: TrainState) -> Any:
    def gradient(old: jax.Array, new: jax.Array) -> np.ndarray:
        share = (np.asarray(old, np.float64) - np.asarray(new, np.float64)) / RATE
        return share / (1 - np.abs(share))

    return jax.tree.map(gradient, _state().parameters, after.parameters)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_any_split_gives_the_same_step(microbatches):
    (whole, of_whole), (split, of_split) = _stepped(1), _stepped(microbatches)
    _assert_close(of_whole.losses, of_split.losses, 2e-6)
    np.testing.assert_allclose(of_split.gradient_norm, of_whole.gradient_norm, rtol=2e-6)
    _assert_close(_gradients(whole), _gradients(split), 5e-6)
    assert all(np.any(gradient) for gradient in jax.tree.leaves(_gradients(whole)))
    _assert_same_bits((of_whole.loads, whole.router_bias), (of_split.loads, split.router_bias))


def test_gradients_are_those_of_the_mean_over_tokens_that_count():
    """A finite difference of the reported losses along the gradient itself."""
    parameters, (after, metrics) = _state().parameters, _stepped(1)
    gradients = _gradients(after)
    squared = sum(float(np.vdot(leaf, leaf)) for leaf in jax.tree.leaves(gradients))
    assert squared**0.5 == pytest.approx(float(metrics.gradient_norm), rel=1e-5)

    def objective(distance: float) -> float:
        moved = jax.tree.map(lambda leaf, step: np.float32(np.asarray(leaf) + distance * step), parameters, gradients)
        _, found = _step(1)(_state()._replace(parameters=moved), _batch())
        mtp, balance = float(found.losses.mtp[0]), float(found.losses.balance)
        return float(found.losses.next_token) + 0.3 * mtp + 1e-4 * 3 * balance

    distance = 1e-3 / squared**0.5
    assert (objective(distance) - objective(-distance)) / (2 * distance) == pytest.approx(squared, rel=0.02)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_the_bias_moves_once_a_step_by_the_sign_of_the_whole_batchs_load(microbatches):
    after, metrics = _stepped(microbatches)
    before, biases = jax.tree.leaves(_state().router_bias), jax.tree.leaves(after.router_bias)
    loads = sorted((np.asarray(load) for load in metrics.loads), key=np.ndim, reverse=True)
    assert {load.shape for load in loads} == {(2, 4), (4,)} == {bias.shape for bias in biases}
    for load in loads:
        (old,), (new,) = ([bias for bias in of if bias.shape == load.shape] for of in (before, biases))
        direction = np.sign(load.mean(axis=-1, keepdims=True) - load).astype(np.float32)
        assert np.any(direction > 0) and np.any(direction < 0)
        np.testing.assert_array_equal(new, np.asarray(old) + SPEED * direction)


def test_an_even_load_moves_no_bias_and_a_load_one_off_does():
    state = _state()._replace(router_bias=jax.tree.map(jnp.zeros_like, _state().router_bias))
    loads = [jnp.array([[5, 5, 5, 5], [5, 5, 4, 6]], jnp.int32), jnp.array([40840, 40960, 40960, 41080], jnp.int32)]
    after = update_router_biases(state, loads, jnp.float32(SPEED), SKELETON)
    found = sorted(jax.tree.leaves(after), key=np.ndim)
    np.testing.assert_array_equal(found[0], SPEED * np.array([1, 0, 0, -1], np.float32))
    np.testing.assert_array_equal(found[1], SPEED * np.array([[0, 0, 0, 0], [0, 0, 1, -1]], np.float32))


@pytest.mark.parametrize(("step", "moves"), [(142, True), (143, False), (147, False)])
def test_the_bias_is_frozen_at_the_end_of_the_run(step, moves):
    after, metrics = _step(1)(_state(step), _batch())
    assert int(after.step) == step + 1 and bool(metrics.finite)
    before = jax.tree.leaves(_state().router_bias)
    for old, new in zip(before, jax.tree.leaves(after.router_bias), strict=True):
        assert bool(np.any(np.asarray(old) != np.asarray(new))) is moves


def test_the_optimizer_knows_no_bias():
    state = _state()
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim) for name, tree in state._asdict().items()
    }
    assert sizes["optimizer"] == 2 * sizes["parameters"]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer)]
    assert sizes["router_bias"] == 12 and not any("bias" in name for name in names)


def test_padding_is_sent_nowhere_and_nothing_is_dropped():
    _, metrics = _stepped(2)
    of_blocks, of_mtp = metrics.loads
    present, predicted_twice = 12 + 12 + 3, 11 + (2 + 7) + 1
    np.testing.assert_array_equal(of_blocks.sum(axis=-1), [2 * present] * 2)
    assert int(of_mtp.sum()) == 2 * predicted_twice
    assert int(metrics.dropped) == 0 and metrics.dropped.dtype == jnp.int32


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_leaves_the_state_bit_for_bit(bad):
    state = _state(7)
    state.parameters["head"] = state.parameters["head"].at[0, 0].set(bad)
    kept = jax.tree.map(np.array, state)
    after, metrics = _step(1)(state, _batch())
    assert not bool(metrics.finite)
    _assert_same_bits(after, kept)


def test_a_batch_of_padding_alone_is_finite_and_moves_no_bias():
    after, metrics = _step(1)(_state(), _batch()._replace(segment_ids=np.zeros((4, 13), np.int32)))
    assert bool(metrics.finite) and float(metrics.losses.next_token) == 0 == float(metrics.gradient_norm)
    _assert_same_bits(after.router_bias, _state().router_bias)


def test_a_step_reports_the_rate_it_used_and_counts_itself():
    after, metrics = _stepped(1)
    assert int(after.step) == 1 and bool(metrics.finite)
    assert float(metrics.learning_rate) == RATE
    assert float(metrics.losses.next_token) > 0 and metrics.losses.mtp.shape == (1,)
