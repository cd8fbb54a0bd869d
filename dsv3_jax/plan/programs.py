"""The programs that a plan compiles: the training step of `train.py`, and prefill and decode of its model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.inference.weights import with_inference_types
from dsv3_jax.model.functional import Skeleton, Tree, abstract_trees, parameter_specs, put_together
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

    def prefill(parameters: Tree, router_bias: Tree, tokens_BS: Array, cache_LBTX: Array) -> tuple[Array, Array]:
        model = put_together(skeleton, parameters, router_bias)
        hidden_BSD, cache_LBTX = model.prefill(tokens_BS, cache_LBTX)
        return jnp.argmax(model.logits(model.norm(hidden_BSD[:, -1:]))[:, 0], axis=-1), cache_LBTX

    return _traced(prefill, config, skeleton, mesh, rows, positions, (rows, positions))


def traced_decode(
    config: Config, skeleton: Skeleton, mesh: Mesh, rows: int, positions: int
) -> tuple[jax.stages.Traced, Given]:
    """One more token for each of `rows` rows, against a cache of `positions` positions."""

    def decode(parameters: Tree, router_bias: Tree, tokens_B1: Array, cache_LBTX: Array) -> tuple[Array, Array]:
        model = put_together(skeleton, parameters, router_bias)
        last_B1 = jnp.full_like(tokens_B1, positions - 1)
        hidden_B1D, cache_LBTX = model.decode(tokens_B1, cache_LBTX, last_B1)
        return jnp.argmax(model.logits(model.norm(hidden_B1D))[:, 0], axis=-1), cache_LBTX

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
    model = config.model
    # A cache is divided as the rows are, its layers on every device.
    of_rows, of_cache = row_spec(mesh), PartitionSpec(None, *row_spec(mesh))
    specs = (*parameter_specs(skeleton, mesh), of_rows, of_cache)
    placed = shardings(mesh, specs)

    def array(leaf: Any, dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    parameters, router_bias = abstract_trees(skeleton)
    typed = with_inference_types(
        lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), parameters, model.precision
    )
    cache = (model.layers, rows, positions, model.cache_width)
    arguments = (
        jax.tree.map(lambda leaf, place: array(leaf, leaf.dtype, place), typed, placed[0]),
        jax.tree.map(lambda leaf, place: array(leaf, leaf.dtype, place), router_bias, placed[1]),
        jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=placed[2]),
        jax.ShapeDtypeStruct(cache, jnp.dtype(model.precision), sharding=placed[3]),
    )
    on_devices = on_mesh(function, mesh, specs, (of_rows, of_cache))
    return jax.jit(on_devices, donate_argnums=3).trace(*arguments), Given(arguments[0], arguments[3])
