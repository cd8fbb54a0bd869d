"""Gradients of weights from products of FP8, on the TPUs that have them, in Pallas: sums over the rows of each group.

Registers hold 32 rows of codes. So every tile of 128 rows has a place of its own, wherever its group begins.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped_rows import LANES, rows_of_visit, tile_of, visits_of
from dsv3_jax.kernels.quantization import TILE, Scaled, in_whole_tiles
from sharding.collectives import spread_alike

# Blocks of [ROWS, COLUMNS] of the result, which is the sum as well: 16 MiB in two buffers. Of codes STEP tiles a time.
ROWS, COLUMNS, STEP = 1024, 2048, 4


def grouped_weight_gradient(rows: Scaled, gradient: Scaled, group_sizes_E: Array, interpret: bool = False) -> Array:
    """`interpret`: emulated, for tests on a CPU."""
    leaves = spread_alike(*rows, *gradient, group_sizes_E)
    rows, gradient, group_sizes_E = Scaled(*leaves[:2]), Scaled(*leaves[2:4]), leaves[4]
    (left_RD, left_sSD), (right_RF, right_sSF) = map(_in_whole_blocks, (rows, gradient))
    (count, depth), width = left_RD.shape, right_RF.shape[1]
    tile, height, columns = STEP * TILE, tile_of(depth, ROWS), tile_of(width, COLUMNS)
    visits, number = visits_of(in_whole_tiles(group_sizes_E), tile, count // tile, of_empty=1)
    result = jax.ShapeDtypeStruct(
        (len(group_sizes_E), depth, width), jnp.float32, manual_axis_type=jax.typeof(left_RD).mat
    )
    operands = left_RD, left_sSD, right_RF, right_sSF
    moved = sum(operand.nbytes for operand in operands) + 4 * result.size
    flops = 2 * (len(rows.codes) - len(group_sizes_E) * TILE) * depth * width  # without what fills up the last tiles
    out = pl.pallas_call(
        _kernel,
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(depth, height), pl.cdiv(width, columns), number),
            in_specs=[
                pl.BlockSpec((tile, height), lambda d, f, v, visits: (visits.tile_V[v], d)),
                pl.BlockSpec((None, STEP, height), lambda d, f, v, visits: (visits.tile_V[v], 0, d)),
                pl.BlockSpec((tile, columns), lambda d, f, v, visits: (visits.tile_V[v], f)),
                pl.BlockSpec((None, STEP, columns), lambda d, f, v, visits: (visits.tile_V[v], 0, f)),
            ],
            out_specs=pl.BlockSpec((None, height, columns), lambda d, f, v, visits: (visits.group_V[v], d, f)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name=f"{kind_of(group_sizes_E)}_float8_gradient",
    )(visits, *operands)
    return out[:, : rows.codes.shape[1], : gradient.codes.shape[1]]


def kind_of(group_sizes_E: Array) -> str:
    """How the name of a kernel begins. Rows of a dense layer fill their buffer (plan/operations.py: GROUPED)."""
    return "grouped_matmul" if len(group_sizes_E) > 1 else "matmul"


def _in_whole_blocks(scaled: Scaled) -> tuple[Array, Array]:
    """Codes with 128 rows a tile, and scales STEP tiles to a matrix; in whole lanes, and in whole matrices."""
    missing, lanes = -len(scaled.scales) % STEP, (0, -scaled.scales.shape[1] % LANES)
    codes = jnp.pad(scaled.codes, [(0, missing * TILE), lanes])
    return codes, jnp.pad(scaled.scales, [(0, missing), lanes]).reshape(-1, STEP, codes.shape[1])


def _kernel(visits, rows, row_scales, gradient, gradient_scales, out):
    visit, tile = pl.program_id(2), rows.shape[0]
    start, stop = rows_of_visit(visits, visit, tile)

    @pl.when(visits.tile_V[visit] * tile <= visits.start_E[visits.group_V[visit]])
    def _():
        out[...] = jnp.zeros_like(out)

    def add(index, _):
        place, one = pl.ds(pl.multiple_of(index * TILE, TILE), TILE), pl.ds(index, 1)
        dims = (((0,), (0,)), ((), ()))
        part = jax.lax.dot_general(rows[place, :], gradient[place, :], dims, preferred_element_type=jnp.float32)
        # One after the other: their product may be too small for a float32.
        out[...] += part * gradient_scales[one, :] * row_scales[one, :].T

    jax.lax.fori_loop(start // TILE, stop // TILE, add, None)
