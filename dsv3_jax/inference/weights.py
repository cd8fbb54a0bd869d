"""The types a model is held in when it only runs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# What computes in float32 whatever the matmuls do: norm gains and the router.
KEPT_FLOAT32 = frozenset({"gain", "router"})


def with_inference_types(change: Callable[[Any, jnp.dtype], Any], tree: Any, precision: str) -> Any:
    """`change(leaf, dtype)` on every parameter of a model or of its tree.

    Matrices get the compute type, to which the model casts them anyway: the results are the same, in half the memory.
    """

    def change_one(path: tuple[Any, ...], leaf: Any) -> Any:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return change(leaf, jnp.dtype(jnp.float32 if KEPT_FLOAT32.intersection(names) else precision))

    return jax.tree_util.tree_map_with_path(change_one, tree)
