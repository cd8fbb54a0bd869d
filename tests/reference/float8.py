"""FP8 with tiles and blocks, slowly: numpy and ml_dtypes, one tile at a time."""

import ml_dtypes
import numpy as np

TILE = 128


def scale(values: np.ndarray, power_of_two: bool = False) -> np.float32:
    """Of one tile."""
    amax = np.max(np.abs(values.astype(np.float32))) if values.size else np.float32(0)
    if not np.isfinite(amax):
        return amax
    amax = np.float32(max(amax, np.float32(1e-4)))
    if not power_of_two:
        return amax * np.float32(1 / 448)
    power = np.float64(2.0**-40)
    while power < np.float64(amax) / 448:
        power *= 2
    return np.float32(power)


def codes(values: np.ndarray, scale: np.float32) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        quotient = values.astype(np.float32) * (np.float32(1) / scale)
        return np.clip(quotient, np.float32(-448), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)


def quantized(values: np.ndarray, rows: list[slice], columns: list[slice], power_of_two: bool = False):
    """Codes of a matrix, and the scale of each of its tiles [rows, columns]."""
    found = np.zeros(values.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros((len(rows), len(columns)), np.float32)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            scales[i, j] = scale(values[row, column], power_of_two)
            found[row, column] = codes(values[row, column], scales[i, j])
    return found, scales


def cut(size: int, step: int = TILE, start: int = 0) -> list[slice]:
    return [slice(start + at, start + min(at + step, size)) for at in range(0, size, step)]


def group_tiles(sizes: list[int]) -> list[slice]:
    """128 rows of one group each."""
    tiles, start = [], 0
    for size in sizes:
        tiles += cut(size, TILE, start)
        start += size
    return tiles


def dequantized(values: np.ndarray, rows: list[slice], columns: list[slice], power_of_two: bool = False) -> np.ndarray:
    """What the codes stand for, in float64."""
    found, scales = quantized(values, rows, columns, power_of_two)
    wide = np.zeros(values.shape)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            wide[row, column] = found[row, column].astype(np.float64) * np.float64(scales[i, j])
    return wide


def as_rows(values: np.ndarray, power_of_two: bool = False) -> np.ndarray:
    return dequantized(values, cut(len(values), 1), cut(values.shape[1]), power_of_two)


def as_blocks(values: np.ndarray, power_of_two: bool = False) -> np.ndarray:
    return dequantized(values, cut(len(values)), cut(values.shape[1]), power_of_two)


def as_columns(values: np.ndarray, sizes: list[int], power_of_two: bool = False) -> np.ndarray:
    """Of rows in groups of these sizes; those in no group become 0."""
    return dequantized(values, group_tiles(sizes), cut(values.shape[1], 1), power_of_two)
