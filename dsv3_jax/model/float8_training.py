"""Layers trained in FP8: parameters as the matrices of a released checkpoint, in blocks of 128 x 128.

A parameter in several dims is one matrix there: heads and the numbers of a head are one dim, and a block may hold the
end of one head and the start of the next. Gate and up are matrices of their own: where a hidden width is no multiple of
128 they are filled up with zeros, and so is what comes of them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.kernels.float8_linear import product, product_of_swiglu
from dsv3_jax.kernels.float8_rows import packed_rows, unpacked_rows, values_of_rows
from dsv3_jax.kernels.quantization import (
    SMALLEST_OF_GRADIENT,
    TILE,
    Recipe,
    Scaled,
    block_scales,
    codes_of,
    quantized_blocks,
    tile_amax,
)
from dsv3_jax.kernels.weighted_swiglu import weighted_swiglu
from dsv3_jax.model_config import ModelConfig
from sharding.collectives import axis_index, gathered, present
from sharding.encoded import Encoded
from sharding.exchange import Wire
from sharding.rules import stored_dim

FILLED_UP = frozenset({"ffn", "expert_ffn"})


def recipe_of(model: ModelConfig) -> Recipe | None:
    """None: not trained in FP8."""
    return Recipe(model.float8_scales, model.float8_tiles) if model.precision == "fp8" else None


def linear(equation: str, x: Array, parameter: nnx.Variable, recipe: Recipe, *, keep_values: bool = False) -> Array:
    """The product with a parameter, whose first dims are the last of x and are summed over; in the type of x.

    `keep_values`: for the backward pass x is kept in another format than FP8.
    """
    left, _, right = equation.partition("->")[0].partition(",")
    summed_over = sum(letter in left for letter in right)
    rows_MD = x.reshape(-1, _size(x.shape[x.ndim - summed_over :]))
    matrices = encoded_matrices(parameter, summed_over, recipe)
    out_MF = product(rows_MD, matrices, _one_group(rows_MD), recipe, keep_values=keep_values)
    columns = parameter.get_value().shape[summed_over:]
    return out_MF.reshape(*x.shape[: x.ndim - summed_over], *columns[:-1], -1)


def feed_forward(x_BSD: Array, gate_up: nnx.Variable, down: nnx.Variable, recipe: Recipe) -> Array:
    """SwiGLU of [D, 2, F] and [F, D]; a sum over this device's part of F."""
    rows_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
    sizes = _one_group(rows_ND)
    gate_and_up_NG = product(rows_ND, encoded_matrices(gate_up, 1, recipe), sizes, recipe)
    out_ND = product_of_swiglu(_swiglu, (gate_and_up_NG,), encoded_matrices(down, 1, recipe), sizes, recipe)
    return out_ND.reshape(x_BSD.shape)


def rows_for_experts(x_ND: Array, recipe: Recipe) -> Encoded:
    """Tokens quantised once, before they are dispatched, with scales that are powers of two."""
    return Encoded(packed_rows(jax.lax.stop_gradient(x_ND), recipe), x_ND)


def answered(
    recipe: Recipe, matrices: tuple[Encoded, Encoded], rows: Encoded, weights_M: Array, group_sizes_e: Array
) -> Array:
    """`moe.answered`: the first product is of the codes that came. The gradient comes with powers of two as well."""
    gate_up, down = matrices
    scaled = unpacked_rows(rows.encoded, rows.values.shape[1])
    gate_and_up_MG = product(Encoded(scaled, rows.values), gate_up, group_sizes_e, recipe)
    by_power_of_two = recipe._replace(scales="power_of_two")
    inputs = gate_and_up_MG, weights_M
    return product_of_swiglu(weighted_swiglu, inputs, down, group_sizes_e, recipe, came_in=by_power_of_two)


def wire(width: int, dtype: jnp.dtype, recipe: Recipe) -> Wire:
    """How gradients of rows travel to experts: each value is one that the experts' layer then quantises as it is."""
    return Wire(
        lambda rows: packed_rows(rows, recipe, SMALLEST_OF_GRADIENT),
        lambda bytes_: values_of_rows(bytes_, width, dtype),
    )


def encoded_matrices(parameter: nnx.Variable, summed_over: int, recipe: Recipe) -> Encoded:
    """`Scaled` [E, D, F] of the whole parameter, quantised from its float32, and the values for the gradient.

    Args:
        parameter: its dims are those of experts if there are any, `summed_over` dims D, then F.
    """
    axes, shard = parameter.get_metadata("logical_axes"), parameter.get_value()
    first = int(axes[0] == "experts")
    split = first + summed_over

    def flat(x: Array) -> Array:
        x = jnp.pad(
            x, [(0, -size % TILE if axis in FILLED_UP else 0) for axis, size in zip(axes, x.shape, strict=True)]
        )
        return x.reshape(_size(x.shape[:first]), _size(x.shape[first:split]), _size(x.shape[split:]))

    stored = stored_dim(axes)
    without_gradient = flat(jax.lax.stop_gradient(shard))
    if stored is None or not present(stored.axes):
        return Encoded(quantized_blocks(without_gradient, recipe), flat(shard))
    values = flat(gathered(shard, stored.dim, stored.axes, jnp.dtype(jnp.float32)))
    return Encoded(_gathered_blocks(without_gradient, 1 if stored.dim < split else 2, stored.axes, recipe), values)


def _gathered_blocks(x_EDF: Array, dim: int, axes: tuple[str, ...], recipe: Recipe) -> Scaled:
    """`quantized_blocks` of matrices held in pieces along a dim. Codes travel, not numbers; a block may be cut."""
    if dim == 2:
        codes_EFD, scales_Efd = _gathered_blocks(x_EDF.swapaxes(1, 2), 1, axes, recipe)
        return Scaled(codes_EFD.swapaxes(1, 2), scales_Efd.swapaxes(1, 2))
    whole = functools.partial(gathered, dim=1, axes=axes)
    amax_EDf = tile_amax(x_EDF)
    scales_EDf, scales_Edf = block_scales(whole(amax_EDf, dtype=amax_EDf.dtype), recipe)
    start, size = axis_index(axes) * x_EDF.shape[1], x_EDF.shape[1]
    codes = codes_of(x_EDF, jax.lax.dynamic_slice_in_dim(scales_EDf, start, size, axis=1))
    bytes_ = whole(jax.lax.bitcast_convert_type(codes, jnp.uint8), dtype=jnp.dtype(jnp.uint8))
    return Scaled(jax.lax.bitcast_convert_type(bytes_, codes.dtype), scales_Edf)


def _swiglu(gate_and_up_NG: Array) -> Array:
    gate, up = jnp.split(gate_and_up_NG, 2, axis=1)
    return jax.nn.silu(gate) * up


def _one_group(rows: Array) -> Array:
    return jnp.array([len(rows)], jnp.int32)


def _size(shape: Any) -> int:
    return math.prod(shape)
