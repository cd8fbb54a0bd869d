"""Every quantiser against a loop over tiles in numpy and ml_dtypes, bit for bit."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import quantization, quantization_tpu
from dsv3_jax.kernels.quantization import (
    Recipe,
    Scaled,
    blocks_of,
    columns_of,
    quantized_blocks,
    quantized_columns,
    quantized_gradient,
    quantized_rows,
    rows_of,
    token_tiles,
)
from tests.reference import float8 as reference

EMULATED = "quantized", "rows_of"
RECIPES = {"float32": Recipe(), "power_of_two": Recipe("power_of_two")}
every_scale = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
ROWS, WIDTH = 300, 2 * 128 + 40
SIZES = [0, 5, 0, 130, 128, 0, 20]
"""Groups; 17 rows are in none."""


@pytest.fixture(params=["xla", "tpu"], autouse=True)
def kernels(request, monkeypatch):
    """Both ways: as XLA does it, and the TPU's kernels, emulated."""
    if request.param == "tpu":
        emulated = {name: functools.partial(getattr(quantization_tpu, name), interpret=True) for name in EMULATED}
        sharing = {name: getattr(quantization_tpu, name) for name in ("ROW", "COLUMN", "BLOCK")}
        monkeypatch.setattr(quantization, "native_kernels", lambda: SimpleNamespace(**emulated, **sharing))


def _hard() -> np.ndarray:
    """Magnitudes from far below the clamp to far above, and a tile for each edge."""
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, WIDTH)) * 10.0 ** random.uniform(-9, 9, (ROWS, 1))
    x[3], x[4, :128], x[5, 128:] = 0, -0.0, 0
    x[6] = np.where(np.arange(WIDTH) % 128 == 7, 1e-4, 1e-7)  # amax at the clamp, the rest subnormal codes
    x[7] = np.where(np.arange(WIDTH) % 128 == 9, -9e-5, 3e-10)  # below it
    for row, exponent in enumerate(range(-12, 12)):  # scales at exact powers of two, and one bit to each side
        x[10 + row] = 448 * 2.0**exponent * random.uniform(-1, 1, WIDTH)
        edge = np.float32(448 * 2.0**exponent)
        x[10 + row, ::128] = edge, np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(np.inf))
    x[40] = 448 * 2.0 ** -np.arange(WIDTH, dtype=np.float64).clip(0, 25)  # down to codes that round to nothing
    x[41, ::2] = 464 / 448  # beside an amax of 1: nothing beyond 448 may come of it
    half_way = np.concatenate([[448], np.arange(34, 64, 4), np.arange(68, 128, 8)])  # between two codes, but the first
    x[42:60] = np.resize(half_way, WIDTH) * random.uniform(0.5, 2, (18, 1))
    return x.astype(np.float32)


def _same_bits(found, codes: np.ndarray, scales: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(found.scales).view(np.uint32), scales.view(np.uint32))
    np.testing.assert_array_equal(np.asarray(found.codes).view(np.uint8), codes.view(np.uint8))


@every_scale
@pytest.mark.parametrize("width", [WIDTH, 256, 1])
def test_rows(recipe, width):
    x = _hard()[:, :width]
    wanted = reference.quantized(x, reference.cut(ROWS, 1), reference.cut(width), recipe.scales == "power_of_two")
    found = jax.jit(lambda x: quantized_rows(x, recipe))(x)
    _same_bits(found, *wanted)
    np.testing.assert_allclose(rows_of(found), reference.as_rows(x, recipe.scales == "power_of_two"), rtol=2**-24)


@every_scale
def test_blocks(recipe):
    x = _hard()
    wanted = reference.quantized(x, reference.cut(ROWS), reference.cut(WIDTH), recipe.scales == "power_of_two")
    found = jax.jit(lambda x: quantized_blocks(x, recipe))(x[None])
    _same_bits(jax.tree.map(lambda leaf: leaf[0], found), *wanted)
    np.testing.assert_allclose(
        blocks_of(found)[0], reference.as_blocks(x, recipe.scales == "power_of_two"), rtol=2**-24
    )


@every_scale
def test_trap_F7_columns_end_with_their_group_and_rows_in_no_group_have_no_part(recipe):
    x = _hard()
    tiles = jax.jit(token_tiles, static_argnums=1)(jnp.array(SIZES, jnp.int32), ROWS)
    slices = reference.group_tiles(SIZES)
    codes, scales = reference.quantized(x, slices, reference.cut(WIDTH, 1), recipe.scales == "power_of_two")
    x[sum(SIZES) :] = np.nan
    found = jax.jit(lambda x, tiles: quantized_columns(x, recipe, tiles))(x, tiles)
    assert len(found.scales) == -(-ROWS // 128) + len(SIZES) and len(found.codes) == 128 * len(found.scales)
    place_M = np.concatenate([128 * tile + np.arange(rows.stop - rows.start) for tile, rows in enumerate(slices)])
    _same_bits(Scaled(found.codes[place_M], found.scales[: len(slices)]), codes[: sum(SIZES)], scales)
    assert not np.delete(np.asarray(found.codes, np.float32), place_M, axis=0).any()
    for tile, rows in enumerate(slices):
        np.testing.assert_array_equal(tiles.tile_of_row_M[rows], tile)
    assert (np.asarray(tiles.tile_of_row_M)[sum(SIZES) :] == len(found.scales) - 1).all()
    exact = reference.as_columns(_hard(), SIZES, recipe.scales == "power_of_two")[: sum(SIZES)]
    np.testing.assert_allclose(columns_of(found)[place_M], exact, rtol=2**-24)


@pytest.mark.parametrize("sizes", [SIZES, [ROWS], [ROWS - 17], [0]])
def test_columns_of_codes_are_those_of_the_numbers_they_stand_for(sizes):
    x = quantized_rows(_hard(), Recipe())
    tiles = token_tiles(jnp.array(sizes, jnp.int32), ROWS)
    found = jax.jit(lambda x: quantized_columns(x, Recipe(), tiles))(x)
    wanted = jax.jit(lambda x: quantized_columns(rows_of(x), Recipe(), tiles))(x)
    _same_bits(found, *map(np.asarray, wanted))


@pytest.mark.parametrize("sizes", [[0, 0], [300], [1] * 30, [0, 299, 1], [128, 172]])
def test_tiles_of_any_groups(sizes):
    tiles = token_tiles(jnp.array(sizes, jnp.int32), ROWS)
    wanted = np.full((-(-ROWS // 128) + len(sizes), 128), ROWS)
    for tile, rows in enumerate(reference.group_tiles(sizes)):
        wanted[tile, : rows.stop - rows.start] = np.arange(rows.start, rows.stop)
    np.testing.assert_array_equal(tiles.row_TR, wanted)


@every_scale
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible_in_its_tile_and_no_other(recipe, bad):
    x = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    x[150, 130] = bad
    tiles = token_tiles(jnp.array([ROWS], jnp.int32), ROWS)
    of_rows = np.asarray(rows_of(quantized_rows(x, recipe)))
    of_columns = np.asarray(columns_of(quantized_columns(x, recipe, tiles)))[:ROWS]
    of_blocks = np.asarray(blocks_of(quantized_blocks(x[None], recipe))[0])
    row, column = np.arange(ROWS)[:, None], np.arange(WIDTH)
    for values, tile in (
        (of_rows, (row == 150) & (column // 128 == 1)),
        (of_columns, (row // 128 == 1) & (column == 130)),
        (of_blocks, (row // 128 == 1) & (column // 128 == 1)),
    ):
        np.testing.assert_array_equal(np.isnan(values), np.broadcast_to(tile, values.shape))


def test_the_ablations_share_scales_over_blocks_and_over_the_tensor():
    x = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    tiles = token_tiles(jnp.array([ROWS], jnp.int32), ROWS)
    cut = functools.partial(reference.quantized, x)
    by_block, by_tensor = Recipe(tiles="gradient_blocks"), Recipe(tiles="tensor")
    blocks, everything = (reference.cut(ROWS), reference.cut(WIDTH)), ([slice(None)], [slice(None)])
    for found, wanted in (
        (quantized_gradient(x, by_block, tiles), cut(*blocks)),
        (quantized_columns(x, by_block, tiles, gradient=True), cut(*blocks)),
        (quantized_rows(x, by_tensor), cut(*everything)),
        (quantized_columns(x, by_tensor, tiles), cut(*everything)),
        (quantized_gradient(x, by_tensor, tiles), cut(*everything)),
    ):
        np.testing.assert_array_equal(np.asarray(found.codes)[:ROWS].view(np.uint8), wanted[0].view(np.uint8))
    fine = quantized_columns(x, by_block, tiles)  # an activation keeps its own tiles
    wanted, _ = reference.quantized(x, reference.cut(ROWS), reference.cut(WIDTH, 1))
    np.testing.assert_array_equal(np.asarray(fine.codes)[:ROWS].view(np.uint8), wanted.view(np.uint8))
