"""The programs that a plan compiles: the training step of `train.py`, and prefill and decode of its model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding

from dsv3_jax.config import Config
from dsv3_jax.inference.placement import ROWS, leaf_specs, over
from dsv3_jax.inference.weights import ready_to_decode
from dsv3_jax.model.functional import Skeleton, abstract_trees, put_together
from dsv3_jax.model.transformer import Cache, Transformer
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.state import TrainState, abstract_state
from dsv3_jax.training.step import make_train_step
from sharding.collectives import joined
from sharding.mesh import row_spec, shardings
from sharding.rules import TENSOR_AXES


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

    def prefill(model: Transformer, tokens_BS: Array, cache: Cache) -> tuple[Array, Cache]:
        hidden_BSD, cache, _ = model.prefill(tokens_BS, cache)
        return _most_probable(model, hidden_BSD[:, -1:]), cache

    return _traced(prefill, config, skeleton, mesh, rows, positions, (rows, positions))


def traced_decode(
    config: Config, skeleton: Skeleton, mesh: Mesh, rows: int, positions: int
) -> tuple[jax.stages.Traced, Given]:
    """One more token for each of `rows` rows, against a cache of `positions` positions."""

    def decode(model: Transformer, tokens_B1: Array, cache: Cache) -> tuple[Array, Cache]:
        last_B1 = jnp.full_like(tokens_B1, positions - 1)
        hidden_B1D, cache, _ = model.decode(tokens_B1, cache, last_B1)
        return _most_probable(model, hidden_B1D), cache

    return _traced(decode, config, skeleton, mesh, rows, positions, (rows, 1))


def _most_probable(model: Transformer, hidden_B1D: Array) -> Array:
    logits_BW = joined(model.logits(model.norm(hidden_B1D)), 2, TENSOR_AXES)[:, 0]
    return jnp.argmax(logits_BW, axis=-1)


def _traced(
    function: Callable,
    config: Config,
    skeleton: Skeleton,
    mesh: Mesh,
    rows: int,
    positions: int,
    tokens: tuple[int, int],
) -> tuple[jax.stages.Traced, Given]:
    """`function(model, tokens, cache)` of the model as generation holds it, its layers one by one."""
    model = jax.eval_shape(ready_to_decode, put_together(skeleton, *abstract_trees(skeleton)))
    found, structure = jax.tree_util.tree_flatten_with_path(model)
    names = [jax.tree_util.keystr(path, simple=True, separator=".").replace(".value", "") for path, _ in found]
    leaves = [leaf for _, leaf in found]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # what a cache is held in depends on the devices
        cache = jax.eval_shape(lambda model: model.empty_cache(rows, positions), model)
    by_rows = jax.tree.map(lambda _: row_spec(mesh), (jax.ShapeDtypeStruct(tokens, jnp.int32), cache))
    arguments = jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        (dict(zip(names, leaves, strict=True)), jax.ShapeDtypeStruct(tokens, jnp.int32), cache),
        shardings(mesh, (dict(zip(names, leaf_specs(structure, mesh), strict=True)), *by_rows)),
    )
    on_devices = over(mesh, structure, function, (ROWS, ROWS), ROWS)

    def program(parameters: dict[str, Array], tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        return on_devices([parameters[name] for name in names], tokens, cache)

    # The layout in which a loop over tokens keeps the cache: a step by itself would turn all of it around, twice.
    by_layer = jax.tree.map(lambda leaf: Format(Layout(tuple(range(leaf.ndim))), leaf.sharding), arguments[2])
    formatted = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), cache, by_layer
    )
    compiled = jax.jit(program, donate_argnums=2, out_shardings=(NamedSharding(mesh, row_spec(mesh)), by_layer))
    return compiled.trace(*arguments[:2], formatted), Given(arguments[0], arguments[2])
