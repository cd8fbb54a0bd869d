"""The programs that a plan compiles: the training step of `train.py`, and prefill and decode of its model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.inference.weights import with_inference_types
from dsv3_jax.model.functional import Skeleton, Tree, abstract_trees, parameter_specs, put_together
from dsv3_jax.model.transformer import Cache, Transformer
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.state import TrainState, abstract_state
from dsv3_jax.training.step import make_train_step
from sharding.mesh import on_mesh, row_spec, shardings


class Given(NamedTuple):
    """What inference is given, besides tokens."""

    parameters: Any
    cache: Any


def traced_training_step(config: Config, skeleton: Skeleton, mesh: Mesh) -> tuple[jax.stages.Traced, TrainState]:
    """One optimizer step, all its microbatches; and the state that it takes, as ShapeDtypeStructs."""
    shape = config.training.batch_size, config.training.sequence_length + 1
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, row_spec(mesh)))
    step = make_train_step(config, skeleton, mesh)
    state = abstract_state(config, skeleton, mesh)
    return step.trace(state, Batch(rows, rows, rows)), state


def traced_prefill(
    config: Config, skeleton: Skeleton, mesh: Mesh, rows: int, positions: int
) -> tuple[jax.stages.Traced, Given]:
    """`rows` prompts of `positions` tokens into an empty cache, and the token that follows each."""

    def prefill(parameters: Tree, router_bias: Tree, tokens_BS: Array, cache: Cache) -> tuple[Array, Cache]:
        model = put_together(skeleton, parameters, router_bias)
        hidden_BSD, cache = model.prefill(tokens_BS, cache)
        return jnp.argmax(model.logits(model.norm(hidden_BSD[:, -1:]))[:, 0], axis=-1), cache

    return _traced(prefill, config, skeleton, mesh, rows, positions, (rows, positions))


def traced_decode(
    config: Config, skeleton: Skeleton, mesh: Mesh, rows: int, positions: int
) -> tuple[jax.stages.Traced, Given]:
    """One more token for each of `rows` rows, against a cache of `positions` positions."""

    def decode(parameters: Tree, router_bias: Tree, tokens_B1: Array, cache: Cache) -> tuple[Array, Cache]:
        model = put_together(skeleton, parameters, router_bias)
        last_B1 = jnp.full_like(tokens_B1, positions - 1)
        hidden_B1D, cache, _ = model.decode(tokens_B1, cache, last_B1)
        return jnp.argmax(model.logits(model.norm(hidden_B1D))[:, 0], axis=-1), cache

    return _traced(decode, config, skeleton, mesh, rows, positions, (rows, 1))


def _traced(
    function: Callable,
    config: Config,
    skeleton: Skeleton,
    mesh: Mesh,
    rows: int,
    positions: int,
    tokens: tuple[int, int],
) -> tuple[jax.stages.Traced, Given]:
    # A cache is divided as the rows are, its layers on every device.
    cache = jax.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0)).empty_cache(rows, positions))
    of_rows, of_cache = row_spec(mesh), [PartitionSpec(None, *row_spec(mesh)) for _ in cache]
    specs = (*parameter_specs(skeleton, mesh), of_rows, of_cache)
    parameters, router_bias = abstract_trees(skeleton)
    typed = with_inference_types(_cast, parameters, config.model.precision)
    arguments = jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        (typed, router_bias, jax.ShapeDtypeStruct(tokens, jnp.int32), cache),
        shardings(mesh, specs),
    )
    on_devices = on_mesh(function, mesh, specs, (of_rows, of_cache))
    return jax.jit(on_devices, donate_argnums=3).trace(*arguments), Given(arguments[0], arguments[3])


def _cast(leaf: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype)
