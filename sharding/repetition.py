"""A sum over a number of terms that is only known when it runs, with its gradient."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import spread_like

# (index, values, constants) -> arrays
Term = Callable[[Array, Any, Any], Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def added_up(term: Term, count: Array, values: Any, constants: Any) -> Any:
    """The sum of term(index, values, constants) for index in [0, count), in the memory of one term.

    Args:
        count: int32 scalar.
        values: tree of floating-point arrays; the gradient is in these.
        constants: tree of arrays without a gradient.
    """
    shapes = jax.eval_shape(term, jnp.int32(0), values, constants)
    start = jax.tree.map(lambda leaf: _zeros(leaf.shape, leaf.dtype, values), shapes)

    def add(index: Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, term(index, values, constants))

    return jax.lax.fori_loop(0, count, add, start)


def _forward(term, count, values, constants):
    return added_up(term, count, values, constants), (count, values, constants)


def _backward(term, saved, gradient):
    count, values, constants = saved

    def add(index, total):
        _, transpose = jax.vjp(lambda values: term(index, values, constants), values)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), total, transpose(gradient)[0])

    start = jax.tree.map(lambda leaf: spread_like(jnp.zeros(leaf.shape, jnp.float32), leaf), values)
    total = jax.lax.fori_loop(0, count, add, start)
    return None, jax.tree.map(lambda sum_, leaf: sum_.astype(leaf.dtype), total, values), None


added_up.defvjp(_forward, _backward)


def _zeros(shape, dtype, like: Any) -> Array:
    return spread_like(jnp.zeros(shape, dtype), *jax.tree.leaves(like))
