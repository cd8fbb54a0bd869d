"""Grouped matmul on CPUs. XLA's own ragged product multiplies every row with every group's matrix there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import spread_like


def product(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    """Group by group and block by block, one plain matmul each.

    A group's last block writes its whole height: what lies past the group's end is overwritten by the next group. Only
    a block that would pass the end of the array is shifted back, and keeps the rows already written.
    """
    count, groups = rows_MD.shape[0], weights_EDF.shape[0]
    blocks = _blocks(count, group_sizes_E)

    def body(group, out_MF):
        weight_DF = jax.lax.dynamic_index_in_dim(weights_EDF, group, keepdims=False)
        for height, number_E, start_E in blocks:

            def block(index, out_MF, height=height, begin=start_E[group]):
                start = begin + index * height
                first = jnp.minimum(start, count - height)
                part = jax.lax.dynamic_slice_in_dim(rows_MD, first, height) @ weight_DF
                written = jax.lax.dynamic_slice_in_dim(out_MF, first, height)
                part = jnp.where((first + jnp.arange(height) >= start)[:, None], part, written)
                return jax.lax.dynamic_update_slice_in_dim(out_MF, part, first, 0)

            out_MF = jax.lax.fori_loop(0, number_E[group], block, out_MF)
        return out_MF

    zeros_MF = spread_like(jnp.zeros((count, weights_EDF.shape[2]), rows_MD.dtype), rows_MD, weights_EDF)
    return jax.lax.fori_loop(0, groups, body, zeros_MF)


def gradients(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array, gradient_MF: Array):
    """Block by block, in place: rows and matrices give way to their gradients as soon as they are of no more use.

    Gradients in arrays of their own would cost a pass over memory to zero them first.
    """
    blocks, stop_E = _blocks(rows_MD.shape[0], group_sizes_E), jnp.cumsum(group_sizes_E)

    def body(group, carry):
        rows_MD, weights_EDF = carry
        weight_DF = jax.lax.dynamic_index_in_dim(weights_EDF, group, keepdims=False)
        of_weight_DF = spread_like(jnp.zeros(weight_DF.shape, jnp.float32), rows_MD, gradient_MF)
        for height, number_E, start_E in blocks:

            def block(index, carry, height=height, begin=start_E[group]):
                rows_MD, of_weight_DF = carry
                first, mine, rows, gradient = _cut(rows_MD, gradient_MF, begin + index * height, height, stop_E[group])
                of_weight_DF += jnp.matmul(rows.T, gradient, preferred_element_type=jnp.float32)
                of_rows = jnp.where(mine, gradient @ weight_DF.T, rows)
                return jax.lax.dynamic_update_slice_in_dim(rows_MD, of_rows, first, 0), of_weight_DF

            rows_MD, of_weight_DF = jax.lax.fori_loop(0, number_E[group], block, (rows_MD, of_weight_DF))
        of_weight_DF = of_weight_DF.astype(weights_EDF.dtype)
        return rows_MD, jax.lax.dynamic_update_index_in_dim(weights_EDF, of_weight_DF, group, 0)

    return jax.lax.fori_loop(0, weights_EDF.shape[0], body, (rows_MD, weights_EDF))


def gradient_of_weights(rows_MD: Array, gradient_MF: Array, group_sizes_E: Array) -> Array:
    blocks, stop_E = _blocks(rows_MD.shape[0], group_sizes_E), jnp.cumsum(group_sizes_E)
    shape = group_sizes_E.shape[0], rows_MD.shape[1], gradient_MF.shape[1]

    def body(group, of_weights_EDF):
        of_weight_DF = spread_like(jnp.zeros(shape[1:], jnp.float32), rows_MD)
        for height, number_E, start_E in blocks:

            def block(index, of_weight_DF, height=height, begin=start_E[group]):
                _, _, rows, gradient = _cut(rows_MD, gradient_MF, begin + index * height, height, stop_E[group])
                return of_weight_DF + jnp.matmul(rows.T, gradient, preferred_element_type=jnp.float32)

            of_weight_DF = jax.lax.fori_loop(0, number_E[group], block, of_weight_DF)
        return jax.lax.dynamic_update_index_in_dim(of_weights_EDF, of_weight_DF.astype(rows_MD.dtype), group, 0)

    return jax.lax.fori_loop(0, shape[0], body, spread_like(jnp.zeros(shape, rows_MD.dtype), rows_MD))


def _cut(rows_MD, gradient_MF, start, height, stop):
    """A block of `height` rows and gradients, where it begins and which of it are within start and stop.

    At the end of the rows it begins earlier, to be as high; gradients outside are 0.
    """
    first = jnp.minimum(start, rows_MD.shape[0] - height)
    place = first + jnp.arange(height)
    mine = ((place >= start) & (place < stop))[:, None]
    rows, gradient = (jax.lax.dynamic_slice_in_dim(x, first, height) for x in (rows_MD, gradient_MF))
    return first, mine, rows, jnp.where(mine, gradient, 0)


class _Blocks(NamedTuple):
    """A group's blocks of one height, one after the other."""

    height: int
    number_E: Array
    start_E: Array
    """Row of each group's first such block."""


def _blocks(rows: int, group_sizes_E: Array) -> list[_Blocks]:
    """Blocks that cover every group, the highest first: a high one is a faster matmul, a low one wastes fewer rows."""
    heights = _block_heights(rows, group_sizes_E.shape[0])
    start_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    left_E = -(-group_sizes_E // heights[-1]) * heights[-1]
    blocks = []
    for height in heights:
        number_E = left_E // height
        blocks.append(_Blocks(height, number_E, start_E))
        start_E, left_E = start_E + number_E * height, left_E - number_E * height
    return blocks


def _block_heights(rows: int, groups: int) -> list[int]:
    """Of the lower blocks, half a one is wasted a group: enough rows for a fast matmul, few enough to waste little."""
    low = 8
    while low < 128 and low * groups < rows:
        low *= 2
    return [height for height in (4 * low, low) if height <= rows] or [rows]
