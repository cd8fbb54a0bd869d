"""What devices of a mesh tell each other, experts' rows apart (dispatch.py).

Every function takes names of mesh axes and acts on those that exist where it is called: on one device, or along an axis
of size 1, it does nothing.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


def present(axes: Sequence[str]) -> tuple[str, ...]:
    """Those of the axes that the surrounding `on_mesh` has, in their order."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in axes if axis in manual)


def axis_size(axes: Sequence[str]) -> int:
    """Devices along all the axes together."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in present(axes))


def axis_index(axes: Sequence[str]) -> Array | int:
    """Which of them this device is, counting along the last axis first; 0 where there is one."""
    return jax.lax.axis_index(present(axes)) if present(axes) else 0


def variation(value: Array) -> tuple[str, ...]:
    """The axes along which devices may hold different values of it, as far as its type knows."""
    return tuple(axis for axis in present(_all_axes()) if axis in jax.typeof(value).mat.varying)


def summed(value: Array, axes: Sequence[str]) -> Array:
    """The sum over the devices along the axes; along an axis where all hold the same value, that value."""
    axes = tuple(axis for axis in present(axes) if axis in variation(value))
    return jax.lax.psum(value, axes) if axes else value


def largest(value: Array, axes: Sequence[str]) -> Array:
    """The largest over the devices along the axes."""
    axes = tuple(axis for axis in present(axes) if axis in variation(value))
    return jax.lax.pmax(value, axes) if axes else value


def spread(value: Array, axes: Sequence[str]) -> Array:
    """The same value, from here on each device's own: its gradient is the sum of theirs, taken here."""
    axes = tuple(axis for axis in present(axes) if axis not in variation(value))
    return jax.lax.pcast(value, axes, to="varying") if axes else value


def spread_like(value: Array, *others: Array) -> Array:
    """`spread` over every axis that one of the others varies along: a loop's first value, of the type of its last."""
    return spread(value, [axis for other in others for axis in variation(other)])


def spread_alike(*values: Array) -> tuple[Array, ...]:
    """All of them `spread` over every axis that one of them varies along: a custom gradient cannot add up by itself."""
    return tuple(spread_like(value, *values) for value in values)


def gathered(shard: Array, dim: int, axes: Sequence[str], dtype: jnp.dtype) -> Array:
    """The whole of an array that is held in pieces along `dim`, cast to `dtype`.

    The pieces travel in `dtype`; their gradient is summed in the type of the shard, each device receiving its piece.
    """
    axes = present(axes)
    return _gathered(shard, dim, axes, dtype) if axes else narrowed(shard, dtype)


def narrowed(array: Array, dtype: jnp.dtype) -> Array:
    """Cast where it is asked for. Of an array that is only ever used in bfloat16, such as a scan's stack of layers,
    XLA:TPU otherwise makes a copy in bfloat16 before the loop, and keeps both; it does not look through this. Nor does
    XLA:CPU, which leaves a rounding out where the number is widened again."""
    if array.dtype == jnp.float32 and dtype == jnp.bfloat16:
        array = jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
    return array.astype(dtype)


def looked_up(table: Array, indices: Array, axes: Sequence[str]) -> Array:
    """Rows of a table [W, D] that is held in pieces along D: [.., D] for indices [..].

    Every device looks its piece up for all, then all send each other what they found: the table itself, which is larger
    than what is asked of it, stays where it is, and so does its gradient.
    """
    axes = present(axes)
    if not axes:
        return table[indices]
    everyones = jax.lax.all_gather(indices, axes, axis=0)
    pieces = jax.lax.all_to_all(table[everyones], axes, split_axis=0, concat_axis=0)
    return jnp.moveaxis(pieces, 0, -2).reshape(*indices.shape, -1)


def joined(piece: Array, dim: int, axes: Sequence[str]) -> Array:
    """The whole of what devices have computed in pieces along `dim`: the same on all of them, and known to be."""
    for axis in reversed(present(axes)):
        piece = jax.lax.all_gather(piece, axis, axis=dim, tiled=True, to="invarying")
    return piece


def anywhere(marked: Array) -> Array:
    """bool, whether one is true on any device of the mesh: what all must agree on before they enter a loop."""
    mine = marked.any()
    return largest(mine.astype(jnp.int32), variation(mine)) > 0 if variation(mine) else mine


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(shard: Array, dim: int, axes: tuple[str, ...], dtype: jnp.dtype) -> Array:
    # One axis at a time and untiled: XLA:TPU makes an all-reduce, twice the traffic, of a tiled gather over several.
    whole = narrowed(shard, dtype)
    for axis in reversed(axes):
        whole = jax.lax.all_gather(whole, axis, axis=dim, tiled=False)
        whole = whole.reshape(*whole.shape[:dim], -1, *whole.shape[dim + 2 :])
    return whole


def _gathered_forward(shard, dim, axes, dtype):
    # The shard's type, not its value, is what the gradient needs.
    return _gathered(shard, dim, axes, dtype), jnp.zeros((0,), shard.dtype)


def _gathered_backward(dim, axes, dtype, like, gradient):
    gradient = gradient.astype(like.dtype)
    for axis in axes:
        before, after = gradient.shape[:dim], gradient.shape[dim + 1 :]
        pieces = jnp.moveaxis(gradient.reshape(*before, axis_size((axis,)), -1, *after), dim, 0)
        # Of pieces that are not next to each other, or of more dims, XLA:TPU makes an all-reduce, twice the traffic.
        pieces = pieces.reshape(pieces.shape[0], -1, pieces.shape[-1])
        piece = jax.lax.psum_scatter(pieces, axis, scatter_dimension=0, tiled=False)
        gradient = piece.reshape(*before, -1, *after)
    return (gradient,)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _all_axes() -> tuple[str, ...]:
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)
