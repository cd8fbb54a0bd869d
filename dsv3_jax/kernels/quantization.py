"""FP8 numbers with a scale a tile, made while training (V3 section 3.3): value = code * scale of its tile.

Codes are float8_e4m3fn everywhere. A tile's scale is its largest magnitude / 448, taken anew at every use; a largest
magnitude below a bound counts as that, so that a tile of zeros has a scale: 1e-4 for activations and weights (the
released kernels), next to nothing for gradients. A loss is divided by the tokens of its batch, 63 million in V3's, and
its gradients are of 1e-10 and less: under the other bound they would all become 0.

Three shapes of tiles, by what a product sums over:
    rows      1 x 128, one token's channels: activations and their gradients
    blocks    128 x 128: weights
    columns   128 x 1, one channel of 128 tokens of one group: activations and gradients where tokens are summed over

The last tile of a width that is no multiple of 128 is shorter. A tile with a NaN or an infinity becomes NaN throughout:
neither may turn into a number.
"""

import math
from types import ModuleType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sharding.mesh import device_kind

TILE = 128
LARGEST = 448.0
"""The largest float8_e4m3fn. The type has no infinity, and a cast does not saturate: above 464 it gives NaN."""
SMALLEST_AMAX, SMALLEST_OF_GRADIENT = 1e-4, 2.0**-100

FLOAT8_TPU = "TPU7x"
"""The kind of the TPUs that multiply FP8 (`sharding.mesh.device_kind`)."""

ScaleFormat = Literal["float32", "power_of_two"]
Tiles = Literal["fine", "gradient_blocks", "tensor"]


class Scaled(NamedTuple):
    """Numbers in FP8."""

    codes: Array
    """float8_e4m3fn."""
    scales: Array
    """float32, one a tile."""


class Recipe(NamedTuple):
    """How a model is trained in FP8."""

    scales: ScaleFormat = "float32"
    """"power_of_two": rounded up to one (UE8M0, V3.1)."""
    tiles: Tiles = "fine"
    """The others are ablations of V3 appendix B.2: gradients in 128 x 128, or one scale for a whole tensor."""


class TokenTiles(NamedTuple):
    """128 rows of one group to a tile, from the group's first row on; the last of a group may be shorter."""

    tile_of_row_M: Array
    """int32. Rows that are in no group have the last tile, which is no group's."""
    row_TR: Array
    """int32 [T, 128], the rows of each tile; M where it has no more."""

    @property
    def one_group(self) -> bool:
        """No row has to be moved to be in its tile's place: rows of one group begin with the first."""
        return len(self.row_TR) == -(-len(self.tile_of_row_M) // TILE) + 1


def native_kernels() -> ModuleType | None:
    """Kernels that make codes on the device that is compiled for; None: XLA does as well."""
    if device_kind() != FLOAT8_TPU:
        return None
    from dsv3_jax.kernels import quantization_tpu  # Pallas takes a second to import

    return quantization_tpu


def token_tiles(group_sizes_E: Array, rows: int) -> TokenTiles:
    """The tiles of rows sorted by group, T = ceil(rows / 128) + E, numbered in the order of the rows."""
    groups = group_sizes_E.shape[0]
    count = -(-rows // TILE) + groups  # never all used: groups have less than rows / 128 + E in all
    stop_E = jnp.cumsum(group_sizes_E)
    tiles_E = in_whole_tiles(group_sizes_E) // TILE
    until_E = jnp.cumsum(tiles_E)
    tile_T = jnp.arange(count)
    group_T = jnp.minimum(jnp.searchsorted(until_E, tile_T, side="right", method="compare_all"), groups - 1)
    start_T = (stop_E - group_sizes_E)[group_T] + (tile_T - (until_E - tiles_E)[group_T]) * TILE
    is_tile_T = tile_T < until_E[-1]
    row_TR = start_T[:, None] + jnp.arange(TILE)
    row_TR = jnp.where(is_tile_T[:, None] & (row_TR < stop_E[group_T][:, None]), row_TR, rows)
    begins_M = jnp.zeros(rows, jnp.int32).at[jnp.where(is_tile_T, start_T, rows)].add(1, mode="drop")
    tile_of_row_M = jnp.where(jnp.arange(rows) < stop_E[-1], jnp.cumsum(begins_M) - 1, count - 1)
    return TokenTiles(tile_of_row_M.astype(jnp.int32), row_TR.astype(jnp.int32))


def in_whole_tiles(group_sizes_E: Array) -> Array:
    """The rows of each group with those that its last tile lacks."""
    return -(-group_sizes_E // TILE) * TILE


def scales_of(amax: Array, scales: ScaleFormat, largest: float = LARGEST, smallest: float = SMALLEST_AMAX) -> Array:
    """max(amax, smallest) / largest; as a power of two 2^ceil(log2 of that), exact. NaN and infinity stay so."""
    amax = _floats(jnp.maximum(_bits(amax), _bits(jnp.float32(smallest))))  # as integers: NaN is above all
    if scales == "float32":
        # Times the reciprocal, which every backend rounds alike; XLA makes that of a division anyway.
        return amax * jnp.float32(1 / largest)
    # With `largest` = fraction * 2^k: amax's exponent less k, and one more where its fraction is beyond that one.
    fraction, power = math.frexp(largest)
    beyond = (1 << 24) - 1 - int(fraction * (1 << 24))
    exponent = ((_bits(amax) + beyond) >> 23) - (power - 1)
    return jnp.where(jnp.isfinite(amax), _floats(exponent << 23), amax)


def largest_of(x: Array, axis: int | tuple[int, ...], keepdims: bool = False) -> Array:
    """The largest magnitude along dims in float32; NaN if there is one.

    Of the bits as integers, which have the order of the magnitudes with NaN above all: XLA:CPU's maximum of floats
    passes over NaN.
    """
    bits = jnp.max(_bits(x.astype(jnp.float32)) & 0x7FFFFFFF, axis=axis, keepdims=keepdims)
    return _floats(bits)


def codes_with(x: Array, scales: Array) -> Array:
    """Codes of numbers whose scales these are, or one of several."""
    # The reciprocal is what XLA makes of a division by what many numbers share, sometimes: numbers half-way between
    # two codes would go either way. The released kernels divide.
    return jnp.clip(x * (1 / scales), -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)


def tile_amax(x: Array) -> Array:
    """The largest magnitude of each tile of 1 x 128: [.., ceil(D / 128)]."""
    return largest_of(_tiled(x, -1), -1)


def quantized_rows(x: Array, recipe: Recipe, smallest: float = SMALLEST_AMAX) -> Scaled:
    """Tiles of 1 x 128 along the last dim: codes [M, D], scales [M, ceil(D / 128)]."""
    if (kernels := native_kernels()) and recipe.tiles != "tensor":
        return kernels.quantized(x, kernels.ROW, recipe.scales, smallest)
    scales = scales_of(_pooled(tile_amax(x), recipe), recipe.scales, smallest=smallest)
    return Scaled(codes_of(x, scales), scales)


def quantized_gradient(x_MF: Array, recipe: Recipe, tiles: TokenTiles) -> Scaled:
    """`quantized_rows`; for the ablation the tiles that one block of 128 x 128 covers have one scale."""
    if recipe.tiles != "gradient_blocks":
        return quantized_rows(x_MF, recipe, SMALLEST_OF_GRADIENT)
    amax_Tf = largest_of(_taken(tile_amax(x_MF), tiles), 1)
    scales = scales_of(amax_Tf, recipe.scales, smallest=SMALLEST_OF_GRADIENT)[tiles.tile_of_row_M]
    return Scaled(codes_of(x_MF, scales), scales)


def quantized_blocks(x_EDF: Array, recipe: Recipe) -> Scaled:
    """Blocks of 128 x 128 of each matrix: codes [E, D, F], scales [E, ceil(D / 128), ceil(F / 128)]."""
    if (kernels := native_kernels()) and recipe.tiles != "tensor":
        count, depth, width = x_EDF.shape
        rows = jnp.pad(x_EDF, [(0, 0), (0, -depth % TILE), (0, 0)]).reshape(-1, width)
        codes, scales = kernels.quantized(rows, kernels.BLOCK, recipe.scales, SMALLEST_AMAX)
        return Scaled(codes.reshape(count, -1, width)[:, :depth], scales.reshape(count, -1, scales.shape[1]))
    amax_EDf = tile_amax(x_EDF)  # of a row's part in each block, all that the block has to know of it
    scales_EDf, scales_Edf = block_scales(amax_EDf, recipe)
    return Scaled(codes_of(x_EDF, scales_EDf), scales_Edf)


def block_scales(amax_EDf: Array, recipe: Recipe) -> tuple[Array, Array]:
    """Of the blocks with these `tile_amax`: the scale of each row's part [E, D, f], and of each block [E, d, f]."""
    scales_Edf = scales_of(_pooled(largest_of(_tiled(amax_EDf, -2), -2), recipe), recipe.scales)
    return jnp.repeat(scales_Edf, TILE, axis=-2)[:, : amax_EDf.shape[-2]], scales_Edf


def codes_of(x: Array, scales: Array) -> Array:
    """Codes [.., D] with these scales [.., ceil(D / 128)]."""
    return _untiled(codes_with(_tiled(x, -1), scales[..., None]), -1, x.shape)


def quantized_columns(x: Array | Scaled, recipe: Recipe, tiles: TokenTiles, *, gradient: bool = False) -> Scaled:
    """Tiles of 128 x 1 along the tokens of numbers [M, F], or of those that `quantized_rows` stand for.

    Every tile has rows of its own: codes [128 T, F], of tile t the rows 128 t to 128 t + 127, 0 where it has no more;
    scales [T, F].
    """
    x = _in_tiles(x, tiles)
    smallest = SMALLEST_OF_GRADIENT if gradient else SMALLEST_AMAX
    in_blocks = gradient and recipe.tiles == "gradient_blocks"
    if (kernels := native_kernels()) and recipe.tiles != "tensor" and not in_blocks:
        return kernels.quantized(x, kernels.COLUMN, recipe.scales, smallest)
    x_MF = rows_of(x) if isinstance(x, Scaled) else x
    x_TRF = x_MF.reshape(-1, TILE, x_MF.shape[1])
    amax_TF = _pooled(largest_of(x_TRF, 1), recipe)
    if in_blocks:
        amax_TF = jnp.repeat(largest_of(_tiled(amax_TF, -1), -1), TILE, axis=-1)[:, : amax_TF.shape[1]]
    scales_TF = scales_of(amax_TF, recipe.scales, smallest=smallest)
    codes_TRF = codes_with(x_TRF.astype(jnp.float32), scales_TF[:, None])
    return Scaled(codes_TRF.reshape(-1, codes_TRF.shape[-1]), scales_TF)


def rows_of(scaled: Scaled, dtype: jnp.dtype = jnp.float32) -> Array:
    """The values of `quantized_rows`, each product rounded once to float32, and once to `dtype`."""
    if kernels := native_kernels():
        return kernels.rows_of(scaled, dtype)
    values = _tiled(scaled.codes, -1).astype(jnp.float32) * scaled.scales[..., None]
    return _untiled(values, -1, scaled.codes.shape).astype(dtype)


def blocks_of(scaled: Scaled) -> Array:
    """The values of `quantized_blocks`, float32."""
    codes, (rows, columns) = scaled.codes, scaled.codes.shape[-2:]
    scales = jnp.repeat(jnp.repeat(scaled.scales, TILE, axis=-2), TILE, axis=-1)
    return codes.astype(jnp.float32) * scales[..., :rows, :columns]


def columns_of(scaled: Scaled) -> Array:
    """The values of `quantized_columns`, float32 [128 T, F]."""
    return scaled.codes.astype(jnp.float32) * jnp.repeat(scaled.scales, TILE, axis=0)


def _pooled(amax: Array, recipe: Recipe) -> Array:
    """Each tile's own, or that of all."""
    return jnp.broadcast_to(largest_of(amax.reshape(-1), 0), amax.shape) if recipe.tiles == "tensor" else amax


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _floats(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _tiled(x: Array, axis: int) -> Array:
    """One dim cut into [tiles, 128], the last tile filled up with zeros; floating-point values as float32."""
    axis %= x.ndim
    missing = -x.shape[axis] % TILE
    if missing:
        x = jnp.pad(x, [(0, missing if dim == axis else 0) for dim in range(x.ndim)])
    x = x if x.dtype == jnp.float8_e4m3fn else x.astype(jnp.float32)
    return x.reshape(*x.shape[:axis], -1, TILE, *x.shape[axis + 1 :])


def _untiled(x: Array, axis: int, shape: tuple[int, ...]) -> Array:
    axis %= len(shape)
    x = x.reshape(*shape[:axis], -1, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(x, 0, shape[axis], axis=axis)


def _in_tiles(x: Array | Scaled, tiles: TokenTiles) -> Array | Scaled:
    """Rows [128 T, F] of which the tile t is 128 t to 128 t + 127, 0 where it has no more."""
    if not isinstance(x, Scaled):
        return _taken(x, tiles).reshape(-1, x.shape[1])
    bytes_TRF = _taken(jax.lax.bitcast_convert_type(x.codes, jnp.uint8), tiles)
    codes_TRF = jax.lax.bitcast_convert_type(bytes_TRF, x.codes.dtype)
    return Scaled(codes_TRF.reshape(-1, x.codes.shape[1]), _taken(x.scales, tiles).reshape(-1, x.scales.shape[1]))


def _taken(x_MF: Array, tiles: TokenTiles) -> Array:
    """[T, 128, F], 0 where a tile has no row."""
    if not tiles.one_group:
        return jnp.take(x_MF, tiles.row_TR, axis=0, mode="fill", fill_value=0)
    (tiles_, rows), (count, width) = tiles.row_TR.shape, x_MF.shape
    x_TRF = jnp.pad(x_MF, [(0, tiles_ * rows - count), (0, 0)]).reshape(tiles_, rows, width)
    return jnp.where((tiles.row_TR < count)[:, :, None], x_TRF, jnp.zeros((), x_MF.dtype))
