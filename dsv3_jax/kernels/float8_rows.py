"""Rows in FP8 as they travel to experts: bytes, a code a number and after them a byte for each scale, a power of two.

One array is one message. A scale's byte b means 2^(b - 127) (UE8M0); infinity and NaN are both 255, and their tile's
codes are such that it stays NaN.
"""

import jax
import jax.numpy as jnp
from jax import Array

from dsv3_jax.kernels.quantization import SMALLEST_AMAX, TILE, Recipe, Scaled, quantized_rows, rows_of


def packed_rows(x_MD: Array, recipe: Recipe, smallest: float = SMALLEST_AMAX) -> Array:
    """uint8 [M, D + ceil(D / 128)] of rows quantised in tiles of 1 x 128; a multiple of 128 bytes if D is one."""
    codes, scales = quantized_rows(x_MD, recipe._replace(scales="power_of_two"), smallest)
    exponents = (jax.lax.bitcast_convert_type(scales, jnp.int32) >> 23).astype(jnp.uint8)
    missing = 0 if codes.shape[1] % TILE else -scales.shape[1] % TILE
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return jnp.concatenate([codes, jnp.pad(exponents, ((0, 0), (0, missing)))], axis=1)


def unpacked_rows(bytes_MB: Array, width: int) -> Scaled:
    """Codes [M, D] and scales [M, ceil(D / 128)] of rows of this width."""
    codes = jax.lax.bitcast_convert_type(bytes_MB[:, :width], jnp.float8_e4m3fn)
    exponents = bytes_MB[:, width : width + -(-width // TILE)].astype(jnp.int32)
    return Scaled(codes, jax.lax.bitcast_convert_type(exponents << 23, jnp.float32))


def values_of_rows(bytes_MB: Array, width: int, dtype: jnp.dtype) -> Array:
    """What they stand for, which bfloat16 holds exactly."""
    return rows_of(unpacked_rows(bytes_MB, width), dtype)
