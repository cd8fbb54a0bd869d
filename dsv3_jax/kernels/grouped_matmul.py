"""Grouped matmul: rows sorted by group, each group times its own matrix. The cost follows the rows, not the groups."""

import jax
import jax.numpy as jnp
from jax import Array


def grouped_matmul(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    """rows of group e times weights[e].

    Args:
        rows_MD: rows ordered by group; sum(group_sizes) of them.
        weights_EDF: one matrix a group, in the type of the rows.
        group_sizes_E: int32, any of them 0.

    Returns:
        [M, F] in the type of the rows, accumulated in float32. Differentiable in rows and weights; an empty group's
        weight gradient is 0.
    """
    # XLA:CPU lowers ragged_dot to a product of every row with every group's matrix; elsewhere it is a real kernel.
    return jax.lax.platform_dependent(
        rows_MD, weights_EDF, group_sizes_E, cpu=blocked_grouped_matmul, default=_ragged_dot
    )


def _ragged_dot(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if rows_MD.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.ragged_dot(
        rows_MD, weights_EDF, group_sizes_E, precision=precision, preferred_element_type=rows_MD.dtype
    )


@jax.custom_vjp
def blocked_grouped_matmul(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    """`grouped_matmul` as a loop over blocks of rows, one plain matmul a block."""
    return _blocked_rows(rows_MD, weights_EDF, group_sizes_E, lambda block, weight: block @ weight, weights_EDF.shape[2])


def _forward(rows_MD, weights_EDF, group_sizes_E):
    return blocked_grouped_matmul(rows_MD, weights_EDF, group_sizes_E), (rows_MD, weights_EDF, group_sizes_E)


def _backward(saved, gradient_MF):
    rows_MD, weights_EDF, group_sizes_E = saved
    gradient_rows_MD = _blocked_rows(
        gradient_MF, weights_EDF, group_sizes_E, lambda block, weight: block @ weight.T, weights_EDF.shape[1]
    )
    return gradient_rows_MD, _blocked_weights(rows_MD, gradient_MF, group_sizes_E).astype(weights_EDF.dtype), None


blocked_grouped_matmul.defvjp(_forward, _backward)


def _blocked_rows(rows, weights, group_sizes_E, product, width) -> Array:
    """[M, width]: product(block of rows, its group's matrix), block by block.

    Blocks go in row order and each writes its whole height: what a group's last block writes past the group's end is
    overwritten by the next group's first block. Only a block that would pass the end of the array is shifted back, and
    keeps the rows already written.
    """
    count, block = rows.shape[0], _block_height(rows.shape[0], weights.shape[0])

    def body(index, out):
        group, start, _ = _locate(index, block, group_sizes_E)
        first = jnp.minimum(start, count - block)
        taken = jax.lax.dynamic_slice_in_dim(rows, first, block)
        made = product(taken, jax.lax.dynamic_index_in_dim(weights, group, keepdims=False))
        kept = jax.lax.dynamic_slice_in_dim(out, first, block)
        made = jnp.where((first + jnp.arange(block) >= start)[:, None], made, kept)
        return jax.lax.dynamic_update_slice_in_dim(out, made, first, 0)

    return jax.lax.fori_loop(0, _block_count(block, group_sizes_E), body, jnp.zeros((count, width), rows.dtype))


def _blocked_weights(rows_MD, gradient_MF, group_sizes_E) -> Array:
    """float32 [E, D, F]: sum over a group's rows of row^T gradient, block by block."""
    count, groups = rows_MD.shape[0], group_sizes_E.shape[0]
    block = _block_height(count, groups)

    def body(index, total_EDF):
        group, start, stop = _locate(index, block, group_sizes_E)
        first = jnp.minimum(start, count - block)
        row = first + jnp.arange(block)
        taken = jax.lax.dynamic_slice_in_dim(rows_MD, first, block)
        gradient = jax.lax.dynamic_slice_in_dim(gradient_MF, first, block)
        gradient = jnp.where(((row >= start) & (row < stop))[:, None], gradient, 0)
        added = jnp.matmul(taken.T, gradient, preferred_element_type=jnp.float32)
        total = jax.lax.dynamic_index_in_dim(total_EDF, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total_EDF, total + added, group, 0)

    zeros = jnp.zeros((groups, rows_MD.shape[1], gradient_MF.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, _block_count(block, group_sizes_E), body, zeros)


def _block_height(rows: int, groups: int) -> int:
    """Rows a block: enough for a fast matmul, few enough that the half block a group wastes on average stays small."""
    height = 8
    while height < 128 and height * groups < rows:
        height *= 2
    return min(height, rows)


def _block_count(block: int, group_sizes_E: Array) -> Array:
    return jnp.sum(-(-group_sizes_E // block))


def _locate(index: Array, block: int, group_sizes_E: Array) -> tuple[Array, Array, Array]:
    """Group of the index-th block, its first row, and the end of the group's rows."""
    last_block_E = jnp.cumsum(-(-group_sizes_E // block))
    group = jnp.sum(last_block_E <= index)
    stop_E = jnp.cumsum(group_sizes_E)
    first_block = last_block_E[group] - -(-group_sizes_E[group] // block)
    start = stop_E[group] - group_sizes_E[group] + (index - first_block) * block
    return group, start, stop_E[group]
