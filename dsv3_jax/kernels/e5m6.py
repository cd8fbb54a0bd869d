"""Numbers in 12 bits, E5M6, with a power of two for each 128: how attention's output is kept (V3 section 3.3.3).

A code is the upper 12 bits of an IEEE binary16: a sign, 5 bits of exponent with bias 15, 6 of fraction; subnormals,
infinities and NaN are as there. It is the nearest to number / scale, ties to even; the largest finite one is 65024. A
scale is the smallest power of two for which no number of its tile is beyond that, magnitudes below 1e-4 counting as
that. Tiles are 128 numbers along the last dim, the last of them shorter. A tile with a NaN or an infinity becomes NaN.

N numbers are kept in N + ceil(N / 2) bytes: the upper 8 bits of each code, then the lower 4 bits two to a byte, those
of number i in the upper half of byte i, those of number ceil(N / 2) + i in its lower half.

bfloat16 holds every value exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv3_jax.kernels.quantization import TILE, scales_of, tile_amax

LARGEST = 65024.0


class Packed(NamedTuple):
    bytes: Array
    """uint8 [.., N + ceil(N / 2)]."""
    scales: Array
    """float32 [.., ceil(N / 128)], powers of two."""


def packed(x: Array) -> Packed:
    """x [.., N] in 12 bits a number."""
    scales = scales_of(tile_amax(x), "power_of_two", LARGEST)
    codes = _codes(x.astype(jnp.float32) / _along(scales, x.shape[-1]))
    first, second = jnp.split(codes & 0xF, [-(-x.shape[-1] // 2)], axis=-1)
    second = jnp.pad(second, [(0, 0)] * (x.ndim - 1) + [(0, first.shape[-1] - second.shape[-1])])
    return Packed(jnp.concatenate([codes >> 4, first << 4 | second], axis=-1).astype(jnp.uint8), scales)


def unpacked(packed: Packed, size: int, dtype: jnp.dtype) -> Array:
    """The `size` numbers [.., N] that were packed, in `dtype`."""
    upper, lower = jnp.split(packed.bytes.astype(jnp.uint16), [size], axis=-1)
    lower = jnp.concatenate([lower >> 4, lower & 0xF], axis=-1)[..., :size]
    halves = jax.lax.bitcast_convert_type(upper << 8 | lower << 4, jnp.float16)
    return (halves.astype(jnp.float32) * _along(packed.scales, size)).astype(dtype)


def _codes(x: Array) -> Array:
    """int32, of numbers within the range."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    # Of float32's 23 bits of fraction 17 are rounded away, and its bias of 127 becomes 15. A fraction that is rounded
    # up to 2 is the next exponent, as it should be.
    normal = ((magnitude + 0xFFFF + ((magnitude >> 17) & 1)) >> 17) - ((127 - 15) << 6)
    subnormal = jnp.round(jnp.abs(x) * 2.0**20).astype(jnp.int32)  # steps of 2^-20 below 2^-14; 64 is the first normal
    code = jnp.where(magnitude < (127 - 14) << 23, subnormal, normal)
    code = jnp.where(jnp.isfinite(x), code, 0x7E0)
    return code | ((bits >> 31) & 1) << 11


def _along(scales: Array, size: int) -> Array:
    return jnp.repeat(scales, TILE, axis=-1)[..., :size]
