"""Blockwise FP8 of the released checkpoints: one float32 scale for each 128x128 block of a weight.

    W[r, c] = float8[r, c] * scale[r // 128, c // 128]

The tensors of scales are called `weight_scale_inv` there, and multiply all the same. Blocks at the right and lower edge
may be short; a block is never any other height (576 rows have 5 rows of scales, of which the last covers 64).

Only numpy and ml_dtypes: any machine can convert. numpy casts from and to float8 value by value; tables are six times
as fast, so values pass in bands of rows that stay in the cache, and no array of scales gets the size of the weight.
"""

from collections.abc import Iterator
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BLOCK = 128
LARGEST = 448.0
"""The largest float8_e4m3fn. The type has no infinity: a cast of anything that rounds beyond gives NaN."""
SMALLEST_AMAX = 1e-4
"""A block's amax counts as at least this, as in DeepSeek's kernels: a block of zeros would divide by zero."""

ScaleFormat = Literal["float32", "ue8m0"]
Float32 = NDArray[np.float32]
Float8 = NDArray[ml_dtypes.float8_e4m3fn]

_BAND = 16  # rows at a time; divides BLOCK


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the grid of scales of a [rows, columns] weight."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def dequantized(values: Float8, scales: Float32, first_row: int = 0, first_column: int = 0) -> Float32:
    """float8 * scale, in float32.

    Args:
        values: [r, c] float8_e4m3fn: any part of the weight, that starts at [first_row, first_column] of it.
        scales: float32: the grid of the whole weight.

    Returns:
        [r, c] float32, each product rounded once. NaN where the code or the scale is NaN.

    Raises:
        ValueError: the grid does not cover the part, or a type is another.
    """
    _require(np.dtype(ml_dtypes.float8_e4m3fn), values=values)
    codes, result = values.view(np.uint8), np.empty(values.shape, np.float32)
    for rows, scale in _bands(values.shape, scales, first_row, first_column):
        band = result[rows]
        _VALUE_OF_CODE.take(codes[rows], out=band, mode="clip")  # any mode but "raise", which copies `out`
        band *= scale
    return result


def requantized(values: Float32, scales: Float32, first_row: int = 0, first_column: int = 0) -> Float8:
    """The nearest float8 to value / scale, ties to even, and 448 beyond the range. A scale of 0 gives zeros.

    Gives back the codes of `dequantized` with the same scales, the sign of a zero included, also where the values were
    rounded to bfloat16 in between: that moves them by at most 1/256, half a step of float8 is at least 1/32. This
    fails only where a product leaves float32's normal range.

    Args:
        values: [r, c] float32: any part of the weight, that starts at [first_row, first_column] of it.
        scales: float32: the grid of the whole weight.

    Returns:
        [r, c] float8_e4m3fn.

    Raises:
        ValueError: a value or a scale is not finite, the grid does not cover the part, or a type is another.
    """
    _require(np.dtype(np.float32), values=values)
    if not np.isfinite(scales).all():
        raise ValueError("a scale is not finite")
    divisors = np.where(scales == 0, np.float32(np.inf), scales)
    result = np.empty(values.shape, np.uint8)
    for rows, divisor in _bands(values.shape, divisors, first_row, first_column):
        if not np.isfinite(values[rows]).all():
            raise ValueError(f"a value of rows {first_row + rows.start} to {first_row + rows.stop - 1} is not finite")
        with np.errstate(over="ignore"):  # infinity is 448 in the table
            quotient = values[rows] / divisor
        _CODE_OF_HALF.take(_upper_half(quotient), out=result[rows], mode="clip")
    return result.view(ml_dtypes.float8_e4m3fn)


def quantized(values: Float32, scale_format: ScaleFormat) -> tuple[Float8, Float32]:
    """A whole weight in float8, and its scales: amax / 448 of each block, in "ue8m0" rounded up to a power of two.

    Args:
        values: [r, c] float32.

    Returns:
        [r, c] float8_e4m3fn, and float32 scales of `scale_shape(r, c)`, none of them 0.

    Raises:
        ValueError: a value is not finite, or the type is another.
    """
    _require(np.dtype(np.float32), values=values)
    scales = _block_scales(values, scale_format)
    return requantized(values, scales), scales


def decoded_scales(raw: NDArray, dtype_name: str) -> Float32:
    """The scales of a file as float32; `dtype_name` is their type's name in the file: F32, F8_E8M0, or U8 for bytes
    of E8M0.

    A byte b of E8M0 means 2^(b - 127), and 255 NaN: to be looked up, as its cast from U8 would give b.

    Raises:
        ValueError: scales of another type.
    """
    if dtype_name == "F32" and raw.dtype == np.float32:
        return raw
    if dtype_name in ("F8_E8M0", "U8") and raw.dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
        return _SCALE_OF_BYTE[raw.view(np.uint8)]
    raise ValueError(f"scales are {dtype_name} ({raw.dtype}), need F32, F8_E8M0 or U8")


def encoded_scales(scales: Float32, dtype_name: str) -> NDArray:
    """float32 scales as an array of a file's type, `decoded_scales` the other way: float32, float8_e8m0fnu or uint8.

    Raises:
        ValueError: a scale that is no power of two where the type holds nothing else, or another type.
    """
    if dtype_name == "F32":
        return scales
    if dtype_name not in ("F8_E8M0", "U8"):
        raise ValueError(f"scales cannot be {dtype_name}: F32, F8_E8M0 or U8")
    fraction, exponent = np.frexp(scales)  # scale = fraction * 2^exponent, fraction in [1/2, 1)
    wrong = (fraction != 0.5) | (exponent < -126)
    if wrong.any():
        raise ValueError(f"the scale {scales[wrong][0]} is no power of two from 2^-127: {dtype_name} cannot hold it")
    biased = (exponent + 126).astype(np.uint8)
    return biased.view(ml_dtypes.float8_e8m0fnu) if dtype_name == "F8_E8M0" else biased


def _require(dtype: np.dtype, **arrays: NDArray) -> None:
    for name, array in arrays.items():
        if array.dtype != dtype:
            raise ValueError(f"{name} are {array.dtype}, need {dtype}")


def _block_scales(values: Float32, scale_format: ScaleFormat) -> Float32:
    amax = np.empty(scale_shape(*values.shape), np.float32)
    edges = np.arange(0, values.shape[1], BLOCK)
    for row, of_row in enumerate(amax):
        block_row = values[row * BLOCK : (row + 1) * BLOCK]
        of_columns = np.maximum(block_row.max(axis=0), -block_row.min(axis=0))  # no |values|, which is a copy
        np.maximum.reduceat(of_columns, edges, out=of_row)
    if not np.isfinite(amax).all():
        raise ValueError(f"block {tuple(np.argwhere(~np.isfinite(amax))[0].tolist())} has a value that is not finite")
    scales: Float32 = np.maximum(amax, SMALLEST_AMAX)
    scales /= LARGEST
    if scale_format == "float32":
        return scales
    # The logarithm in floating point is off by one step for some scales next to a power of two; frexp is exact.
    fraction, exponent = np.frexp(scales)
    return np.ldexp(1.0, exponent - (fraction == 0.5)).astype(np.float32)


def _bands(
    shape: tuple[int, ...], scales: Float32, first_row: int, first_column: int
) -> Iterator[tuple[slice, Float32]]:
    """Bands of rows of a part, none of which crosses into other blocks, each with the scales [c] of its columns."""
    rows, columns = shape
    _require(np.dtype(np.float32), scales=scales)
    needed = scale_shape(first_row + rows, first_column + columns)
    covers = scales.ndim == 2 and scales.shape[0] >= needed[0] and scales.shape[1] >= needed[1]
    if not covers or min(first_row, first_column) < 0:
        part = f"rows {first_row}:{first_row + rows}, columns {first_column}:{first_column + columns}"
        raise ValueError(f"scales are {scales.shape}, need at least {needed} for {part}")
    top, left = first_row // BLOCK, first_column // BLOCK
    of_blocks = np.repeat(scales[top : needed[0], left : needed[1]], BLOCK, axis=1)
    of_columns = of_blocks[:, first_column - left * BLOCK :][:, :columns]
    start = first_row
    while start < first_row + rows:
        stop = min((start // _BAND + 1) * _BAND, first_row + rows)
        yield slice(start - first_row, stop - first_row), of_columns[start // BLOCK - top]
        start = stop


def _upper_half(values: Float32) -> NDArray[np.uint32]:
    """The upper 16 bits of each float32, the lowest set where any of the lower 16 was. Overwrites `values`.

    That is rounding to odd: with 4 bits more than float8 has, rounding again to float8 gives what one rounding gives.
    """
    bits = values.view(np.uint32)
    sticky = bits & 0xFFFF
    sticky += 0xFFFF  # reaches bit 16 unless all were zero
    bits |= sticky
    bits >>= 16
    return bits


def _code_of_half() -> NDArray[np.uint8]:
    """The float8 code of a float32 with these upper 16 bits and no others."""
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


_CODE_OF_HALF = _code_of_half()
_VALUE_OF_CODE = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_SCALE_OF_BYTE = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))
