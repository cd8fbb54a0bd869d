"""Linear layers trained in FP8: what is quantised when, and the gradients (V3 section 3.3, figure 6).

    product          rows 1 x 128       times  weights 128 x 128
    input gradient   gradient 1 x 128   times  weights 128 x 128, the same codes
    weight gradient  rows 128 x 1       times  gradient 128 x 1, in float32

For the last, rows are read as codes of 1 x 128, the form they are kept in, multiplied by their scales and quantised
anew along the tokens; no tile crosses from one expert's rows to another's. A gradient is at hand as it is and is
quantised from that both ways, but where it came in FP8 from another device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.kernels import scaled_matmul
from dsv3_jax.kernels.quantization import (
    Recipe,
    Scaled,
    quantized_columns,
    quantized_gradient,
    quantized_rows,
    rows_of,
    token_tiles,
)
from sharding.collectives import spread_alike
from sharding.encoded import Encoded

SWIGLU_INPUT = "swiglu_input"
"""The name of what the second of two layers keeps for the backward pass."""


class Options(NamedTuple):
    """What is known when compiling."""

    recipe: Recipe
    came_in: Recipe | None = None
    """Scales in which the gradient came to the layer from another device; None: it did not come in FP8."""
    keep_values: bool = False
    """The rows are kept as values, and quantised along the tokens from these."""


def product(
    rows: Array | Encoded,
    matrices: Encoded,
    group_sizes_E: Array,
    recipe: Recipe,
    *,
    keep_values: bool = False,
) -> Array:
    """Rows of group e times the matrix of group e: [M, F] in the type of the rows' values.

    Args:
        rows: [M, D] to be quantised, or `Scaled` already, ordered by group.
        matrices: `Scaled` [E, D, F], and the float32 values that get the gradient.
        group_sizes_E: int32. Rows past their sum are no rows.
        recipe: scales and tiles.
        keep_values: the rows themselves are what is kept, in another format.
    """
    if not isinstance(rows, Encoded):
        rows = Encoded(quantized_rows(jax.lax.stop_gradient(rows), recipe), rows)
    arguments = _alike(rows.values, rows.encoded, matrices.values, matrices.encoded, group_sizes_E)
    return _product(Options(recipe, keep_values=keep_values), *arguments)


def product_of_swiglu(
    swiglu: Callable[..., Array],
    inputs: tuple[Array, ...],
    matrices: Encoded,
    group_sizes_E: Array,
    recipe: Recipe,
    *,
    came_in: Recipe | None = None,
) -> Array:
    """`product` of swiglu(*inputs), of which the first input [M, .., F] is kept in FP8 and the result computed again.

    The forward pass multiplies what comes of the inputs as they are; their codes are for the backward pass alone.

    Args:
        came_in: where the result's gradient comes from other devices in FP8, the scales that it has there. Rows that
            are on this device get the same.
    """
    arguments = _alike(inputs, matrices.values, matrices.encoded, group_sizes_E)
    return _product_of(swiglu, Options(recipe, came_in), *arguments)


def _alike(*arguments: Any) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    return jax.tree.unflatten(structure, spread_alike(*leaves))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(options, rows_MD, rows: Scaled, weights_EDF, weights: Scaled, group_sizes_E):
    return scaled_matmul.grouped_product(rows, weights, group_sizes_E, rows_MD.dtype)


def _forward(options, rows_MD, rows, weights_EDF, weights, group_sizes_E):
    kept = rows_MD if options.keep_values else rows
    out_MF = scaled_matmul.grouped_product(rows, weights, group_sizes_E, rows_MD.dtype)
    return out_MF, (kept, jnp.zeros((0,), rows_MD.dtype), weights, group_sizes_E)


def _backward(options, saved, gradient_MF):
    kept, like, weights, group_sizes_E = saved
    of_rows_MD, of_weights_EDF = _gradients(options, kept, like.dtype, weights, group_sizes_E, gradient_MF)
    return of_rows_MD, None, of_weights_EDF, None, None


_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product_of(swiglu, options, inputs, weights_EDF, weights: Scaled, group_sizes_E):
    rows_MD = swiglu(*inputs)
    return scaled_matmul.grouped_product(quantized_rows(rows_MD, options.recipe), weights, group_sizes_E, rows_MD.dtype)


def _forward_of(swiglu, options, inputs, weights_EDF, weights, group_sizes_E):
    first, *others = inputs
    kept = jax.tree.map(lambda leaf: checkpoint_name(leaf, SWIGLU_INPUT), quantized_rows(first, options.recipe))
    like = jnp.zeros((0,), first.dtype)
    return _product_of(swiglu, options, inputs, weights_EDF, weights, group_sizes_E), (
        kept, like, tuple(others), weights, group_sizes_E
    )  # fmt: skip


def _backward_of(swiglu, options, saved, gradient_MF):
    kept, like, others, weights, group_sizes_E = saved
    rows_MD, transpose = jax.vjp(swiglu, rows_of(kept, like.dtype), *others)
    of_rows_MD, of_weights_EDF = _gradients(options, rows_MD, rows_MD.dtype, weights, group_sizes_E, gradient_MF)
    return transpose(of_rows_MD), of_weights_EDF, None, None


_product_of.defvjp(_forward_of, _backward_of)


def _gradients(
    options: Options, rows: Array | Scaled, dtype: jnp.dtype, weights: Scaled, group_sizes_E: Array, gradient_MF: Array
) -> tuple[Array, Array]:
    """Of the rows in `dtype` and of the weights in float32."""
    tiles = token_tiles(group_sizes_E, len(gradient_MF))
    by_row = quantized_gradient(gradient_MF, options.came_in or options.recipe, tiles)
    of_rows_MD = scaled_matmul.grouped_input_gradient(by_row, weights, group_sizes_E, dtype)
    rows_by_column = quantized_columns(rows, options.recipe, tiles)
    by_column = quantized_columns(by_row if options.came_in else gradient_MF, options.recipe, tiles, gradient=True)
    return of_rows_MD, scaled_matmul.grouped_weight_gradient(rows_by_column, by_column, group_sizes_E)
