"""Blockwise FP8 against torch's casts and a loop over blocks."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv3_jax.convert.fp8_blocks import (
    BLOCK,
    decoded_scales,
    dequantized,
    encoded_scales,
    quantized,
    requantized,
    scale_shape,
)

FLOAT8 = ml_dtypes.float8_e4m3fn
CODES = np.arange(256, dtype=np.uint8)
FINITE = CODES[np.isfinite(CODES.view(FLOAT8).astype(np.float32))]


@pytest.fixture
def chosen() -> np.random.Generator:
    return np.random.default_rng(0)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[values.dtype.itemsize])


def dequantized_by_torch(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    of_values = torch.from_numpy(scales).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return (values * of_values[: values.shape[0], : values.shape[1]]).numpy()


def quantized_by_loop(values: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    codes = np.zeros(values.shape, np.uint8)
    scales = np.zeros([math.ceil(size / BLOCK) for size in values.shape], np.float32)
    for row, column in np.ndindex(*scales.shape):
        where = np.s_[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
        block = torch.from_numpy(values[where])
        scale = block.abs().max().clamp(min=1e-4) / 448
        if power_of_two:
            scale = torch.tensor(next(2.0**e for e in range(-149, 128) if 2.0**e >= float(scale)))
        codes[where] = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        scales[row, column] = float(scale)
    return codes, scales


@pytest.mark.parametrize("shape", [(256, 384), (576, 200), (1, 1), (127, 129), (130, 7)])
def test_dequantized_is_the_product_in_float32_of_any_part(shape, chosen):
    codes = chosen.choice(CODES, shape)
    scales = chosen.lognormal(size=scale_shape(*shape)).astype(np.float32)
    whole, expected = dequantized(codes.view(FLOAT8), scales), dequantized_by_torch(codes, scales)
    np.testing.assert_array_equal(whole, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(whole)[number], bits(expected)[number])
    for _ in range(30):
        (top, bottom), (left, right) = (sorted(chosen.integers(0, size + 1, 2)) for size in shape)
        part = dequantized(codes[top:bottom, left:right].view(FLOAT8), scales, top, left)
        np.testing.assert_array_equal(part, expected[top:bottom, left:right])


@pytest.mark.parametrize("rows", [576, 300])
def test_trap_F3_a_block_is_128_high_whatever_the_rows(rows):
    scales = np.arange(1, 1 + -(-rows // 128), dtype=np.float32)[:, None]
    values = dequantized(np.ones((rows, 3), FLOAT8), scales)
    np.testing.assert_array_equal(values[:, 0], np.arange(rows) // 128 + 1)
    assert scale_shape(576, 7168) == (5, 56)


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("shape", [(256, 384), (576, 200), (1, 1), (127, 129)])
def test_quantized_is_what_a_loop_over_blocks_gives(shape, scale_format, chosen):
    values = (chosen.standard_normal(shape) * 10.0 ** chosen.uniform(-7, 3, shape)).astype(np.float32)
    values[0, 0] = 448 * 2.0**-3  # a scale that is a power of two already
    expected_codes, expected_scales = quantized_by_loop(values, scale_format == "ue8m0")
    codes, scales = quantized(values, scale_format)
    assert codes.dtype == FLOAT8 and scales.dtype == np.float32
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(bits(codes), expected_codes)


@pytest.mark.parametrize("exponent", range(-20, 100, 7))
def test_scales_of_ue8m0_go_up_at_the_first_float_above_a_power_of_two(exponent):
    above = np.float32(448) * np.float32(2.0**exponent)
    for steps, expected in ((-1, exponent), (0, exponent), (2, exponent + 1)):
        amax = above
        for _ in range(abs(steps)):
            amax = np.nextafter(amax, np.float32(np.inf * steps))
        _, scales = quantized(np.full((1, 1), -amax), "ue8m0")
        assert scales[0, 0] == 2.0**expected


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_trap_F2_a_block_of_zeros_has_a_scale_and_stays_zeros(scale_format):
    values = np.zeros((200, 130), np.float32)
    values[150, 129] = 3
    codes, scales = quantized(values, scale_format)
    assert (scales > 0).all() and np.isfinite(scales).all()
    np.testing.assert_array_equal(dequantized(codes, scales) != 0, values != 0)


def test_trap_F1_what_is_beyond_448_saturates():
    values = np.array([[448, 449, 464, 465, 480, 1e30, -1e30, 3e38]], np.float32)
    one = np.ones((1, 1), np.float32)
    np.testing.assert_array_equal(requantized(values, one).astype(np.float32), np.clip(values, -448, 448))
    np.testing.assert_array_equal(requantized(values, one * 1e-30).astype(np.float32), np.sign(values) * 448)


def test_every_rounding_is_to_nearest_even():
    # All codes, the middles between them, and the floats next to both: where rounding twice would show.
    values = FINITE.view(FLOAT8).astype(np.float32)
    middles = (values[:-1] + values[1:]) / 2
    at = np.concatenate([values, middles[np.isfinite(middles)], np.float32([2.0**-10, 1e-30, 1e-45])])
    at = np.concatenate([at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(-np.inf))])[None]
    at = at[:, np.abs(at[0]) <= 464]
    expected = torch.from_numpy(at).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(bits(requantized(at, np.ones(scale_shape(*at.shape), np.float32))), expected)


@pytest.mark.parametrize("rounded", [False, True])
def test_requantized_gives_back_every_finite_code(rounded, chosen):
    rows, columns = 3 * BLOCK, 2 * BLOCK * FINITE.size
    codes = np.tile(FINITE, (rows, 2 * BLOCK))
    fractions = chosen.uniform(1, 2, scale_shape(rows, columns))
    scales = np.ldexp(fractions, chosen.integers(-116, 117, fractions.shape)).astype(np.float32)
    scales[0] = chosen.uniform(1e-5, 1e-3, scales.shape[1])  # what checkpoints have
    values = dequantized(codes.view(FLOAT8), scales)
    if rounded:
        values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(bits(requantized(values, scales)), codes)
    part = requantized(values[70:300, 5:777], scales, 70, 5)
    np.testing.assert_array_equal(bits(part), codes[70:300, 5:777])


def test_a_scale_of_zero_gives_zeros():
    values = dequantized(np.full((2, 2), -3, FLOAT8), np.zeros((1, 1), np.float32))
    assert not values.any()
    assert not requantized(np.ones((2, 2), np.float32), np.zeros((1, 1), np.float32)).astype(np.float32).any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_values_and_scales_that_are_not_finite_are_refused(wrong):
    values, one = np.ones((40, 3), np.float32), np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="a scale is not finite"):
        requantized(values, one * np.float32(wrong))
    values[39, 1] = wrong
    for scale_format in ("float32", "ue8m0"):
        with pytest.raises(ValueError, match=r"block \(1, 2\) has a value that is not finite"):
            quantized(np.pad(values, ((100, 0), (300, 0))), scale_format)
    with pytest.raises(ValueError, match="a value of rows 1024 to 1039 is not finite"):
        requantized(values, np.ones((9, 1), np.float32), 1000)


def test_parts_outside_the_grid_and_other_types_are_refused():
    values, grid = np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)
    for first in ((255, 0), (0, 255), (-1, 0)):
        with pytest.raises(ValueError, match=r"scales are \(2, 2\), need at least"):
            requantized(values, grid, *first)
    with pytest.raises(ValueError, match="values are float32, need float8_e4m3fn"):
        dequantized(values, grid)
    with pytest.raises(ValueError, match="values are float64, need float32"):
        requantized(values.astype(np.float64), grid)
    with pytest.raises(ValueError, match="values are float64, need float32"):
        quantized(values.astype(np.float64), "float32")
    with pytest.raises(ValueError, match="scales are float64, need float32"):
        requantized(values, grid.astype(np.float64))


def test_trap_F5_bytes_of_e8m0_are_viewed_and_not_cast():
    for raw, name in ((CODES, "U8"), (CODES, "F8_E8M0"), (CODES.view(ml_dtypes.float8_e8m0fnu), "F8_E8M0")):
        scales = decoded_scales(raw, name)
        assert scales.dtype == np.float32 and np.isnan(scales[255])
        np.testing.assert_array_equal(scales[:255], [2.0 ** (code - 127) for code in range(255)])
        encoded = encoded_scales(scales[:255], name)
        assert encoded.dtype == (np.uint8 if name == "U8" else ml_dtypes.float8_e8m0fnu)
        np.testing.assert_array_equal(bits(encoded), CODES[:255])
    scales = np.float32([0.3])
    assert decoded_scales(scales, "F32") is scales and encoded_scales(scales, "F32") is scales


@pytest.mark.parametrize("wrong", [3, 0, -2, 2.0**-128, np.inf, np.nan, np.nextafter(np.float32(1), np.float32(2))])
def test_scales_that_e8m0_cannot_hold_are_refused(wrong):
    with pytest.raises(ValueError, match="is no power of two"):
        encoded_scales(np.float32([[1, wrong]]), "F8_E8M0")


def test_scales_of_other_types_are_refused():
    with pytest.raises(ValueError, match=r"scales are BF16 \(bfloat16\), need F32"):
        decoded_scales(np.ones(1, ml_dtypes.bfloat16), "BF16")
    with pytest.raises(ValueError, match=r"scales are U8 \(float32\), need F32"):
        decoded_scales(np.ones(1, np.float32), "U8")
    with pytest.raises(ValueError, match="scales cannot be BF16"):
        encoded_scales(np.ones(1, np.float32), "BF16")
