"""Products of FP8 on Hopper GPUs, in Pallas: codes of rows sorted by group times codes of a matrix a group.

The tensor cores sum over the 128 of a tile. Each such sum is read out, multiplied by the scales of both tiles and added
up in float32: a sum that stays in the tensor cores has about 14 bits (V3 section 3.3.2). A block of [128, 128] of the
result is two warpgroups' work, one of them multiplying while the other adds; a third fetches what comes next.

The tensor cores take FP8 with what is summed over last. So the matrices of the product, and both operands of the
gradient of weights, are first turned around.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.quantization import TILE, Scaled, in_whole_tiles, token_tiles
from sharding.collectives import spread_alike, spread_like

WARPGROUPS = 2
HEIGHT = TILE // WARPGROUPS
"""Rows of a block that are one warpgroup's."""
STAGES = 4
"""Tiles of both operands, 33 KiB, that are in shared memory at a time."""
FETCHING_REGISTERS = 40
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
NEIGHBOURS = 8
"""Blocks side by side that are computed at a time, so that what they share is found in the cache."""


def grouped_product(
    rows: Scaled, weights: Scaled, group_sizes_E: Array, dtype: jnp.dtype, interpret: Any = None
) -> Array:
    """`interpret`: the parameters of an emulation, for tests on a CPU."""
    matrices = Scaled(weights.codes.swapaxes(1, 2), weights.scales)
    return _product(rows, matrices, group_sizes_E, dtype, interpret)


def grouped_input_gradient(
    gradient: Scaled, weights: Scaled, group_sizes_E: Array, dtype: jnp.dtype, interpret: Any = None
) -> Array:
    matrices = Scaled(weights.codes, weights.scales.swapaxes(1, 2))
    return _product(gradient, matrices, group_sizes_E, dtype, interpret)


def grouped_weight_gradient(rows: Scaled, gradient: Scaled, group_sizes_E: Array, interpret: Any = None) -> Array:
    leaves = spread_alike(*rows, *gradient, group_sizes_E)
    rows, gradient, group_sizes_E = Scaled(*leaves[:2]), Scaled(*leaves[2:4]), leaves[4]
    left, right = _turned_around(rows), _turned_around(gradient)
    depth, width = len(left.codes), len(right.codes)
    blocks = depth // TILE, width // TILE
    tiles_E = in_whole_tiles(group_sizes_E) // TILE
    # An empty group has the last tile, which is nobody's and all zeros.
    first_E = jnp.where(tiles_E > 0, jnp.cumsum(tiles_E) - tiles_E, len(left.scales) - 1).astype(jnp.int32)
    steps_E = jnp.maximum(tiles_E, 1).astype(jnp.int32)

    def kernel(first_E, steps_E, left, left_scales, right, right_scales, out, staged):
        group = jax.lax.axis_index("group")
        row, column = plgpu.planar_snake(jax.lax.axis_index("block"), blocks, 1, NEIGHBOURS)
        down, across = pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)

        def store(warpgroup, total):
            staged[warpgroup] = total
            plgpu.commit_smem()
            mine = pl.ds(row * TILE + warpgroup * HEIGHT, HEIGHT)
            plgpu.copy_smem_to_gmem(staged.at[warpgroup], out.at[group, mine, across])
            plgpu.wait_smem_to_gmem(0)

        operands = left.at[down], right.at[across], left_scales.at[:, down], right_scales.at[:, across]
        _accumulate(operands, first_E[group], steps_E[group], store)

    out_EDF = _called(
        kernel,
        jax.ShapeDtypeStruct((len(group_sizes_E), depth, width), jnp.float32),
        {"group": len(group_sizes_E), "block": blocks[0] * blocks[1]},
        interpret,
    )(first_E, steps_E, left.codes, left.scales, right.codes, right.scales)
    out_EDF = spread_like(out_EDF, left.codes)  # a kernel's results are taken to be the same on all devices
    return out_EDF[:, : rows.codes.shape[1], : gradient.codes.shape[1]]


def _product(rows: Scaled, matrices: Scaled, group_sizes_E: Array, dtype: jnp.dtype, interpret: Any) -> Array:
    """[M, F] of rows [M, D], and of matrices with codes [E, F, D] and scales [E, d, f]."""
    leaves = spread_alike(*rows, *matrices, group_sizes_E)
    rows, matrices, group_sizes_E = Scaled(*leaves[:2]), Scaled(*leaves[2:4]), leaves[4]
    count, width = len(rows.codes), matrices.codes.shape[1]
    row_TR = token_tiles(group_sizes_E, count).row_TR
    start_T, size_T = row_TR[:, 0], jnp.sum(row_TR < count, axis=1)
    group_T = jnp.minimum(jnp.sum(jnp.cumsum(group_sizes_E) <= start_T[:, None], axis=1), len(group_sizes_E) - 1)
    # The last tile of all may reach past the rows; and what is fetched has to have rows of whole 16 bytes.
    left_RD, right_EFD = _filled_up(rows.codes, 0, 1, after=TILE), _filled_up(matrices.codes, 1, 2)
    left_dR, right_EdF = _filled_up(rows.scales, 0, after=TILE).T, jnp.repeat(matrices.scales, TILE, axis=2)
    blocks = len(row_TR), right_EFD.shape[1] // TILE

    def kernel(start_T, size_T, group_T, left, left_scales, right, right_scales, out, staged):
        tile, column = plgpu.planar_snake(jax.lax.axis_index("block"), blocks, 1, NEIGHBOURS)
        start, size, group = start_T[tile], size_T[tile], group_T[tile]
        down, across = pl.ds(start, TILE), pl.ds(column * TILE, TILE)

        def store(warpgroup, total):
            staged[warpgroup] = total.astype(dtype)
            plgpu.commit_smem()
            stored: Any = 0
            mine = jnp.clip(size - warpgroup * HEIGHT, 0, HEIGHT)
            # What is copied at a time has a size known when compiling: so many rows as each bit of their number says.
            for some in (1 << bit for bit in reversed(range(HEIGHT.bit_length()))):

                @pl.when(mine & some != 0)
                def _(some=some, stored=stored):
                    place = pl.ds(start + warpgroup * HEIGHT + stored, some)
                    plgpu.copy_smem_to_gmem(staged.at[warpgroup].at[pl.ds(stored, some)], out.at[place, across])

                stored += mine & some
            plgpu.wait_smem_to_gmem(0)

        @pl.when(size > 0)
        def _():
            codes = left.at[down], right.at[group, across]
            scales = left_scales.at[:, down], right_scales.at[group, :, across]
            _accumulate((*codes, *scales), 0, left.shape[1] // TILE, store)

    out_MF = _called(
        kernel,
        # Rows at least as many as are copied at a time.
        jax.ShapeDtypeStruct((max(count, HEIGHT), right_EFD.shape[1]), dtype),
        {"block": blocks[0] * blocks[1]},
        interpret,
    )(*(x.astype(jnp.int32) for x in (start_T, size_T, group_T)), left_RD, left_dR, right_EFD, right_EdF)
    return spread_like(out_MF, left_RD)[:count, :width]


def _called(kernel: Callable[..., None], out: jax.ShapeDtypeStruct, grid: dict[str, int], interpret: Any) -> Callable:
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=[plgpu.SMEM((WARPGROUPS, HEIGHT, TILE), out.dtype)],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=interpret,
    )


def _accumulate(operands: tuple, first: Any, steps: Any, store: Callable[[Any, Array], None]) -> None:
    """In a kernel: a block of the result, and to `store` a warpgroup's number and its rows of it.

    Args:
        operands: in main memory codes of left and right, [128, K] each, and their scales, [K / 128, 128] each.
        first, steps: which tiles of the K are summed over.
    """
    warpgroup = jax.lax.axis_index("warpgroup")
    mine = pl.ds(warpgroup * HEIGHT, HEIGHT)

    def add(_, left, right, left_scales, right_scales, total):
        # One after the other: their product may be too small for a float32.
        part = _multiplied(left.at[mine], right)
        part *= jax.lax.broadcast_in_dim(plgpu.layout_cast(right_scales[...], BY_COLUMN), part.shape, [1])
        return total + part * jax.lax.broadcast_in_dim(plgpu.layout_cast(left_scales[mine], BY_ROW), part.shape, [0])

    def compute(sums_up):
        store(warpgroup, sums_up(plgpu.layout_cast(jnp.zeros((HEIGHT, TILE), jnp.float32), plgpu.Layout.WGMMA)))

    transforms = plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(TILE)
    codes = plgpu.BlockSpec((TILE, TILE), lambda step: (0, first + step), transforms=transforms)
    scales = plgpu.BlockSpec((None, TILE), lambda step: (first + step, 0))
    plgpu.emit_pipeline_warp_specialized(
        add,
        grid=(steps,),
        memory_registers=FETCHING_REGISTERS,
        in_specs=[codes, codes, scales, scales],
        max_concurrent_steps=STAGES,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        compute_context=compute,
    )(*operands)


def _multiplied(left: Any, right: Any) -> Array:
    """Of codes in shared memory, [64, 128] times the transpose of [128, 128], by the tensor cores."""

    def multiply(part):
        plgpu.wgmma(part, left, plgpu.transpose_ref(right, (1, 0)))
        return part[...]

    return pl.run_scoped(multiply, plgpu.ACC((HEIGHT, TILE), jnp.float32))


def _turned_around(scaled: Scaled) -> Scaled:
    """Codes [F, 128 T] and scales [T, F], in whole tiles."""
    return Scaled(_filled_up(scaled.codes, 1).T, _filled_up(scaled.scales, 1))


def _filled_up(x: Array, *dims: int, after: int = 0) -> Array:
    """Zeros up to whole tiles in these dims, and `after` the first; the dims are whole in any but tiny models."""
    missing = [-size % TILE if dim in dims else 0 for dim, size in enumerate(x.shape)]
    return jnp.pad(x, [(0, missing[0] + after), *((0, size) for size in missing[1:])])
