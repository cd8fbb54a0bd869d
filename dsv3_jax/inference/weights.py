"""How a model is held when it only runs: in which types, every layer by itself, and ready to decode."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from dsv3_jax.inference.placement import mesh_of, placed
from dsv3_jax.model.float8 import Float8Blocks
from dsv3_jax.model.layers import unstack
from dsv3_jax.model.moe import Experts, MixtureOfExperts
from dsv3_jax.model.transformer import Transformer
from sharding.mesh import on_mesh
from sharding.rules import partition_spec

# What computes in float32 whatever the matmuls do: norm gains and the router.
KEPT_FLOAT32 = frozenset({"gain", "router"})
FLOAT8_BLOCKS = frozenset({"codes", "scales"})


def with_inference_types(change: Callable[[Any, jnp.dtype], Any], tree: Any, precision: str) -> Any:
    """`change(leaf, dtype)` on every parameter of a model or of its tree.

    Matrices get the compute type, to which the model casts them anyway: the results are the same, in half the memory.
    Those held in FP8 stay as they are.
    """

    def change_one(path: tuple[Any, ...], leaf: Any) -> Any:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        if names[-1] in FLOAT8_BLOCKS:
            return leaf
        return change(leaf, jnp.dtype(jnp.float32 if KEPT_FLOAT32.intersection(names) else precision))

    return jax.tree_util.tree_map_with_path(change_one, tree)


def ready_to_decode(model: Transformer) -> Transformer:
    """The model cast and unstacked once, instead of at every token; of one that is ready, the same arrays.

    Raises:
        PlacementError: it is divided over a mesh that it cannot generate on.
    """
    mesh = mesh_of(model)

    def cast(array: Array, dtype: jnp.dtype) -> Array:
        return array if array.dtype == dtype else array.astype(dtype)

    model = unstacked(with_inference_types(cast, model, model.model.dtype), mesh)
    return placed(model, mesh) if mesh else model


def unstacked(model: Transformer, mesh: Mesh | None = None) -> Transformer:
    """The model with a list of blocks, ready to decode, in place of each stack; not for training."""
    model = nnx.clone(model)
    for name in ("dense_blocks", "moe_blocks"):
        stacked = getattr(model, name, None)
        if stacked is not None and not isinstance(stacked, nnx.List):
            blocks = unstack(stacked)
            setattr(model, name, blocks)
    stacks: Any = model.stacks()  # lists of blocks by now
    for block in (*itertools.chain(*stacks), *(module.block for module in model.mtp)):
        block.attention.keep_absorbed()
        if isinstance(block.feed_forward, MixtureOfExperts):
            _put_gate_beside_up(block.feed_forward.experts, mesh)
    return model


def _put_gate_beside_up(experts: Experts, mesh: Mesh | None) -> None:
    """[e, D, 2, F] of each device's experts as the [e, D, 2 F] they are multiplied with.

    To a TPU these are different layouts: at every token it would write most of the model anew.
    """
    held: Any = experts.gate_up.get_value()
    if isinstance(held, Float8Blocks):
        held = held.evenly_cut()
    leaves, structure = jax.tree.flatten(held)
    if leaves[0].ndim == 3:
        return
    *axes, _, width = experts.gate_up.get_metadata("logical_axes")

    def flat(matrix: Array) -> Array:
        return matrix.reshape(*matrix.shape[:2], -1)

    if mesh is not None:
        before, after = (partition_spec(names, mesh) for names in ((*axes, "gate_up", width), (*axes, width)))
        flat = jax.jit(on_mesh(flat, mesh, (before,), after))
    value = jax.tree.unflatten(structure, map(flat, leaves))
    if isinstance(value, Float8Blocks):
        *blocks, _, block = value.blocks[-4:]
        value = dataclasses.replace(value, blocks=(*blocks, block))
    experts.gate_up = nnx.Param(value, logical_axes=(*axes, width))
