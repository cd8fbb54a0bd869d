"""How a model is held when it only runs: in which types, every layer by itself, and ready to decode."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.inference.placement import mesh_of, placed
from dsv3_jax.model.layers import unstack
from dsv3_jax.model.transformer import Transformer

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

    model = unstacked(with_inference_types(cast, model, model.model.precision))
    return placed(model, mesh) if mesh else model


def unstacked(model: Transformer) -> Transformer:
    """The model with a list of blocks, ready to decode, in place of each stack; not for training."""
    model = nnx.clone(model)
    for name in ("dense_blocks", "moe_blocks"):
        stacked = getattr(model, name, None)
        if stacked is not None and not isinstance(stacked, nnx.List):
            blocks = unstack(stacked)
            for block in blocks:
                block.attention.keep_absorbed()
            setattr(model, name, blocks)
    for module in model.mtp:
        module.block.attention.keep_absorbed()
    return model
