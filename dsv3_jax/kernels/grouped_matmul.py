"""Grouped matmul: rows sorted by group, each group times its own matrix. The cost follows the rows, not the groups."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Up to so many rows a CPU is faster with a matrix copied for every row than with a loop.
FEW_ROWS = 8

# The two functions that differ by platform are the product and its gradients, under one differentiation rule: what is
# saved for the backward pass are the arguments themselves, which a scan over layers does not have to copy.


@jax.custom_vjp
def grouped_matmul(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    """rows of group e times weights[e].

    Args:
        rows_MD: rows ordered by group; sum(group_sizes) of them.
        weights_EDF: one matrix a group, in the type of the rows; in place of F there may be several dims.
        group_sizes_E: int32, any of them 0.

    Returns:
        [M, F] in the type of the rows, accumulated in float32. Differentiable in rows and weights; an empty group's
        weight gradient is 0.
    """
    # XLA:CPU lowers ragged_dot to a product of every row with every group's matrix; elsewhere it is a real kernel.
    product_MF = jax.lax.platform_dependent(
        rows_MD, _flat(weights_EDF), group_sizes_E, cpu=_blocked_product, default=_ragged_product
    )
    return product_MF.reshape(rows_MD.shape[0], *weights_EDF.shape[2:])


def _forward(rows_MD, weights_EDF, group_sizes_E):
    return grouped_matmul(rows_MD, weights_EDF, group_sizes_E), (rows_MD, weights_EDF, group_sizes_E)


def _backward(saved, gradient_MF):
    rows_MD, weights_EDF, group_sizes_E = saved
    gradient_rows_MD, gradient_weights_EDF = jax.lax.platform_dependent(
        rows_MD,
        _flat(weights_EDF),
        group_sizes_E,
        gradient_MF.reshape(rows_MD.shape[0], -1),
        cpu=_blocked_gradients,
        default=_ragged_gradients,
    )
    return gradient_rows_MD, gradient_weights_EDF.reshape(weights_EDF.shape), None


grouped_matmul.defvjp(_forward, _backward)


def _flat(weights_EDF: Array) -> Array:
    return weights_EDF.reshape(*weights_EDF.shape[:2], math.prod(weights_EDF.shape[2:]))


def _ragged_product(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if rows_MD.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.ragged_dot(
        rows_MD, weights_EDF, group_sizes_E, precision=precision, preferred_element_type=rows_MD.dtype
    )


def _ragged_gradients(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array, gradient_MF: Array):
    _, backward = jax.vjp(lambda rows, weights: _ragged_product(rows, weights, group_sizes_E), rows_MD, weights_EDF)
    return backward(gradient_MF)


def _blocked_product(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    """A loop over blocks of rows, one plain matmul a block; of few rows, as in decoding, one batched matmul."""
    if rows_MD.shape[0] <= FEW_ROWS:
        group_M = jnp.sum(jnp.cumsum(group_sizes_E) <= jnp.arange(rows_MD.shape[0])[:, None], axis=1)
        product_MF = jnp.einsum("md,mdf->mf", rows_MD, weights_EDF[group_M], preferred_element_type=jnp.float32)
        return product_MF.astype(rows_MD.dtype)
    return _blocked_rows(rows_MD, weights_EDF, group_sizes_E, jnp.matmul, weights_EDF.shape[2])


def _blocked_gradients(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array, gradient_MF: Array):
    gradient_rows_MD = _blocked_rows(
        gradient_MF, weights_EDF, group_sizes_E, lambda block, weight: block @ weight.T, weights_EDF.shape[1]
    )
    return gradient_rows_MD, _blocked_weights(rows_MD, gradient_MF, group_sizes_E).astype(weights_EDF.dtype)


class _Blocks(NamedTuple):
    """The plan of a loop over blocks of rows, none of which spans two groups; entries past `number` are not used."""

    number: Array
    group: Array
    start: Array
    """First row of the block."""
    stop: Array
    """End of the rows of the block's group."""


def _blocks(rows: int, height: int, group_sizes_E: Array) -> _Blocks:
    """Blocks of `height` rows, the last of each group possibly fewer."""
    blocks_E = -(-group_sizes_E // height)
    last_E, stop_E = jnp.cumsum(blocks_E), jnp.cumsum(group_sizes_E)
    index = jnp.arange(rows // height + group_sizes_E.shape[0])
    group = jnp.minimum(jnp.sum(last_E <= index[:, None], axis=1), group_sizes_E.shape[0] - 1)
    start = (stop_E - group_sizes_E)[group] + (index - (last_E - blocks_E)[group]) * height
    return _Blocks(last_E[-1], group, start, stop_E[group])


def _blocked_rows(rows, weights, group_sizes_E, product, width) -> Array:
    """[M, width]: product(block of rows, its group's matrix), block by block.

    Blocks go in row order and each writes its whole height: what a group's last block writes past the group's end is
    overwritten by the next group's first block. Only a block that would pass the end of the array is shifted back, and
    keeps the rows already written.
    """
    count, height = rows.shape[0], _block_height(rows.shape[0], weights.shape[0])
    blocks = _blocks(count, height, group_sizes_E)

    def body(index, out):
        start = blocks.start[index]
        first = jnp.minimum(start, count - height)
        taken = jax.lax.dynamic_slice_in_dim(rows, first, height)
        made = product(taken, jax.lax.dynamic_index_in_dim(weights, blocks.group[index], keepdims=False))
        kept = jax.lax.dynamic_slice_in_dim(out, first, height)
        made = jnp.where((first + jnp.arange(height) >= start)[:, None], made, kept)
        return jax.lax.dynamic_update_slice_in_dim(out, made, first, 0)

    return jax.lax.fori_loop(0, blocks.number, body, jnp.zeros((count, width), rows.dtype))


def _blocked_weights(rows_MD, gradient_MF, group_sizes_E) -> Array:
    """float32 [E, D, F]: sum over a group's rows of row^T gradient, block by block."""
    count, groups = rows_MD.shape[0], group_sizes_E.shape[0]
    height = _block_height(count, groups)
    blocks = _blocks(count, height, group_sizes_E)

    def body(index, total_EDF):
        group, start, stop = blocks.group[index], blocks.start[index], blocks.stop[index]
        first = jnp.minimum(start, count - height)
        row = first + jnp.arange(height)
        taken = jax.lax.dynamic_slice_in_dim(rows_MD, first, height)
        gradient = jax.lax.dynamic_slice_in_dim(gradient_MF, first, height)
        gradient = jnp.where(((row >= start) & (row < stop))[:, None], gradient, 0)
        added = jnp.matmul(taken.T, gradient, preferred_element_type=jnp.float32)
        total = jax.lax.dynamic_index_in_dim(total_EDF, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total_EDF, total + added, group, 0)

    zeros = jnp.zeros((groups, rows_MD.shape[1], gradient_MF.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, blocks.number, body, zeros)


def _block_height(rows: int, groups: int) -> int:
    """Rows a block: enough for a fast matmul, few enough that the half block a group wastes on average stays small."""
    height = 8
    while height < 128 and height * groups < rows:
        height *= 2
    return min(height, rows)
