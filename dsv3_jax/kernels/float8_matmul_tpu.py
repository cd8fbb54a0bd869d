"""A few rows times matrices held in FP8, on TPUs, in Pallas: a number of a matrix leaves main memory as one byte.

XLA writes a matrix of FP8 out in the compute type before it multiplies, which moves more than bfloat16 would have. Here
a tile is dequantised where it is multiplied. It is for decoding, where a tile takes longer to fetch than to multiply
with: all rows stay in fast memory, and a group takes those from its first one on, WINDOW at a time, of which only its
own are kept.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sharding.collectives import spread_alike

BLOCK, ROWS, WINDOW = 128, 16, 128
# Tiles of [STEP, COLUMNS]; with all rows, two buffers of what comes and goes and the tile in float32 about 12 MiB.
STEP, COLUMNS, MOST_ROWS = 512, 1024, 512


def fits(rows: int, depth: int, width: int) -> bool:
    """Whether `product` takes so many rows and such matrices."""
    return rows <= MOST_ROWS and depth % BLOCK == 0 and width % BLOCK == 0


def product(
    rows_MD: Array, codes_EDF: Array, scales_EdF: Array, group_sizes_E: Array, interpret: bool = False
) -> Array:
    """Rows of group e times the matrix codes[e] * scales[e], each number of it rounded to the type of the rows.

    Args:
        rows_MD: rows ordered by group; those past the sum of the sizes are no rows, and their results mean nothing.
        codes_EDF: float8_e4m3fn.
        scales_EdF: float32 [E, D / BLOCK, F], one for BLOCK numbers of a column.
        group_sizes_E: int32, any of them 0.
        interpret: emulated, for tests on a CPU.

    Returns:
        [M, F] in the type of the rows, accumulated in float32.
    """
    count = rows_MD.shape[0]
    window = min(WINDOW, -(-count // ROWS) * ROWS)
    padding = -count % ROWS + window - ROWS  # the last window begins with the last rows
    rows, codes, scales = spread_alike(jnp.pad(rows_MD, [(0, padding), (0, 0)]), codes_EDF, scales_EdF)
    (height, depth), (groups, _, width) = rows.shape, codes.shape
    step, columns = _tile(depth, STEP), _tile(width, COLUMNS)
    stop_E = jnp.cumsum(group_sizes_E).astype(jnp.int32)
    # The scales of a step as a matrix of their own, which may have fewer rows than a register.
    scales = scales.reshape(groups, depth // step, step // BLOCK, width)
    out = pl.pallas_call(
        functools.partial(_kernel, step=step, window=window),
        out_shape=jax.ShapeDtypeStruct((height, width), rows.dtype, manual_axis_type=jax.typeof(rows).mat),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(width // columns, groups, depth // step),
            in_specs=[
                pl.BlockSpec((height, step), lambda f, e, d, _: (0, d)),
                pl.BlockSpec((None, step, columns), lambda f, e, d, _: (e, d, f)),
                pl.BlockSpec((None, None, step // BLOCK, columns), lambda f, e, d, _: (e, d, 0, f)),
            ],
            out_specs=pl.BlockSpec((height, columns), lambda f, e, d, _: (0, f)),
            scratch_shapes=[pltpu.VMEM((height, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * window * (min(groups, count) + count // window) * depth * width,
            transcendentals=0,
            bytes_accessed=codes.nbytes + scales.nbytes + rows.nbytes + height * width * rows.dtype.itemsize,
        ),
        interpret=interpret,
        name="float8_matmul",
    )(stop_E, rows, codes, scales)
    return out[:count]


def _kernel(stop_E, rows, codes, scales, out, total, *, step, window):
    group, at = pl.program_id(1), pl.program_id(2)
    start = jnp.where(group == 0, 0, stop_E[jnp.maximum(group - 1, 0)])

    @pl.when((group == 0) & (at == 0))
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(at == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(stop_E[group] > start)
    def _():
        first = start // ROWS * ROWS
        precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        for block in range(step // BLOCK):
            within = pl.ds(block * BLOCK, BLOCK)
            matrix = (codes[within, :].astype(jnp.float32) * scales[block, :][None]).astype(rows.dtype)

            def multiply(index, _, within=within, matrix=matrix):
                place = pl.ds(pl.multiple_of(first + index * window, ROWS), window)
                part = jnp.dot(rows[place, within], matrix, precision=precision, preferred_element_type=jnp.float32)
                total[place, :] += part

            jax.lax.fori_loop(0, pl.cdiv(stop_E[group] - first, window), multiply, None)

    @pl.when(at == pl.num_programs(2) - 1)
    def _():
        place = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        written = out[...].astype(jnp.float32)
        is_mine = (place >= start) & (place < stop_E[group])
        out[...] = jnp.where(is_mine, total[...], written).astype(out.dtype)


def _tile(size: int, most: int) -> int:
    """The largest tile of whole blocks that divides `size`."""
    return max(tile for tile in range(BLOCK, most + 1, BLOCK) if size % tile == 0)
