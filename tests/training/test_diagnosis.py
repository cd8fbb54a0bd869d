"""A step that is not finite: the message names the first tensor that was not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import config as tiny
from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, abstract_trees, skeleton_of
from dsv3_jax.training.diagnosis import first_bad_tensor
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.state import TrainState
from sharding.mesh import one_device

WHOLE = dataclasses.replace(
    tiny,
    model=dataclasses.replace(
        tiny.model, vocabulary=20, width=8, layers=3, dense_layers=1, dense_ffn_width=8, heads=2, query_latent=4,
        key_value_latent=4, nope_head_dim=4, rope_head_dim=2, value_head_dim=4, experts=4, experts_per_token=2,
        expert_ffn_width=4, expert_groups=2, mtp_depth=1,
    ),
)  # fmt: skip
DENSE = dataclasses.replace(WHOLE, model=dataclasses.replace(WHOLE.model, layers=1, mtp_depth=0))


def _state(config: Config) -> tuple[TrainState, Skeleton]:
    skeleton, random = skeleton_of(config.model), np.random.default_rng(0)
    trees = jax.tree.map(lambda leaf: jnp.float32(0.1 * random.normal(size=leaf.shape)), abstract_trees(skeleton))
    return TrainState(jnp.int32(0), *trees, optimizer=()), skeleton


def _batch() -> Batch:
    tokens = np.random.default_rng(1).integers(0, 20, (2, 7)).astype(np.int32)
    positions = np.tile(np.arange(7, dtype=np.int32), (2, 1))
    return Batch(jnp.asarray(tokens), jnp.ones((2, 7), jnp.int32), jnp.asarray(positions))


def _set(tree: Any, name: str, place: tuple[int | slice, ...], value: float) -> None:
    *path, last = name.split(".")
    for key in path:
        tree = tree[int(key) if key.isdecimal() else key]
    tree[last] = tree[last].at[place].set(value)


def _diagnosis(config: Config, *poisons: tuple[str, tuple[int | slice, ...], float]) -> str:
    state, skeleton = _state(config)
    for poison in poisons:
        _set(state._asdict(), *poison)
    return first_bad_tensor(state, _batch(), config, skeleton, one_device())


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("embedding", (3, 1)),
        ("dense_blocks.feed_forward.gate_up", (0, 2, 1, 3)),
        ("moe_blocks.feed_forward.experts.down", (1, 3, 0, 0)),
        ("moe_blocks.feed_forward.router.weight", (0, 0, 0)),
        ("mtp.0.projection", (5, 5)),
        ("norm.gain", (0,)),
    ],
)
@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (-np.inf, "infinity")])
def test_a_bad_parameter_is_named(name, place, value, kind):
    assert _diagnosis(WHOLE, (f"parameters.{name}", place, value)) == f"parameter {name} has a {kind}"


def test_a_bad_router_bias_is_named_and_after_the_parameters():
    bias = ("router_bias.moe_blocks.feed_forward.router.bias", (1, 2), np.nan)
    assert _diagnosis(WHOLE, bias) == "router bias moe_blocks.feed_forward.router.bias has a NaN"
    assert "parameter norm.gain" in _diagnosis(WHOLE, bias, ("parameters.norm.gain", (0,), np.inf))


@pytest.mark.parametrize(("block", "stack", "layer"), [(0, "dense", 0), (1, "moe", 0), (2, "moe", 1)])
def test_an_overflow_inside_the_model_is_placed_after_its_block(block, stack, layer):
    network = "feed_forward" if stack == "dense" else "feed_forward.shared"
    huge = (f"parameters.{stack}_blocks.{network}.down", (layer,), 3e38)
    message = _diagnosis(WHOLE, huge, (f"parameters.{stack}_blocks.feed_forward_norm.gain", (layer,), 1e3))
    assert message.startswith(f"the residual stream after block {block} has a")


def test_a_loss_that_overflows_is_named():
    huge = ("parameters.head", (slice(None),), 3e38)
    message = _diagnosis(DENSE, huge, ("parameters.norm.gain", (slice(None),), 10.0))
    assert message.startswith("the next-token loss has a")


def test_gradients_whose_squares_overflow_are_told_apart_from_bad_ones():
    message = _diagnosis(DENSE, ("parameters.head", (slice(None), 0), 1e22))
    assert "squared gradients" in message and "has a" not in message
