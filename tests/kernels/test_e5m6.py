"""Twelve bits a number against every value the format has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.e5m6 import packed, unpacked

POSITIVE = (np.arange(0x7C0, dtype=np.uint16) << 4).view(np.float16).astype(np.float64)
"""All finite magnitudes, in order of their codes."""


def _nearest(x: np.ndarray) -> np.ndarray:
    """Codes of the nearest magnitudes, ties to the even code."""
    above = np.searchsorted(POSITIVE, x).clip(1, len(POSITIVE) - 1)
    lower, upper = x - POSITIVE[above - 1], POSITIVE[above] - x
    return np.where((lower < upper) | ((lower == upper) & (above % 2 == 1)), above - 1, above)


@pytest.mark.parametrize("size", [128, 32, 300, 7])
def test_a_number_is_kept_as_the_nearest_of_the_format_in_one_and_a_half_bytes(size):
    random = np.random.default_rng(size)
    x = (random.standard_normal((64, size)) * 2.0 ** random.uniform(-40, 40, (64, 1))).astype(np.float32)
    x[0], x[1, ::2] = 0, -0.0
    x[2] = 65024 * 2.0 ** -random.uniform(0, 38, size)  # down to subnormals and to nothing
    x[3] = 65024 * 2.0**-20 * random.integers(0, 2, size)  # an amax that just fits
    x[4, 0] = np.nextafter(np.float32(65024), np.float32(1e9)) * 2.0**5  # and one that does not
    x[5] = POSITIVE[random.integers(0, len(POSITIVE) - 1, size)] + 2.0**-21  # ties among subnormals
    kept = jax.jit(packed)(x)
    assert kept.bytes.dtype == jnp.uint8 and kept.bytes.shape == (64, size + -(-size // 2))
    codes = np.zeros((64, size), np.int64)
    for start in range(0, size, 128):
        tile = x[:, start : start + 128].astype(np.float64)
        amax = np.maximum(np.abs(tile).max(axis=1), np.float32(1e-4))
        scale = 2.0 ** np.ceil(np.log2(amax / 65024))
        np.testing.assert_array_equal(kept.scales[:, start // 128], scale)
        sign = np.signbit(tile).astype(np.int64) << 11
        codes[:, start : start + 128] = _nearest(np.abs(tile) / scale[:, None]) | sign
    half = -(-size // 2)
    lower = np.pad(codes & 15, ((0, 0), (0, 2 * half - size)))
    wanted = np.concatenate([codes >> 4, lower[:, :half] << 4 | lower[:, half:]], axis=1)
    np.testing.assert_array_equal(kept.bytes, wanted)
    values = np.where(codes >> 11, -1, 1) * POSITIVE[codes & 0x7FF]
    scales = np.repeat(np.asarray(kept.scales, np.float64), 128, axis=1)[:, :size]
    np.testing.assert_array_equal(unpacked(kept, size, jnp.float32), values * scales)
    # Kept once more, and in bfloat16, it is the same.
    again = unpacked(packed(unpacked(kept, size, jnp.bfloat16)), size, jnp.bfloat16)
    np.testing.assert_array_equal(again.astype(jnp.float32), values * scales)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(bad):
    x = np.ones((3, 200), np.float32)
    x[1, 150] = bad
    wanted = (np.arange(3)[:, None] == 1) & (np.arange(200) >= 128)
    np.testing.assert_array_equal(np.isnan(unpacked(packed(x), 200, jnp.float32)), wanted)
