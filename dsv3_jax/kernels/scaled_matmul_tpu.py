"""Products of FP8 on the TPUs that have them, in Pallas: codes of rows sorted by group times codes of a matrix a group.

A matrix unit sums over the 128 of a tile, in float32; what it gives is multiplied by the scales of both tiles and added
up in float32. The numbers that the codes stand for exist nowhere.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped_rows import LANES, is_within, rows_of_visit, tile_of, visits_of
from dsv3_jax.kernels.quantization import TILE, Scaled
from dsv3_jax.kernels.scaled_gradient_tpu import grouped_weight_gradient, kind_of
from sharding.collectives import spread_alike

__all__ = ["grouped_input_gradient", "grouped_product", "grouped_weight_gradient"]

# Tiles of [ROWS, STEP] x [STEP, COLUMNS]. In VMEM, with two buffers for all that comes and goes: 2 + 2 MiB of codes,
# 8 MiB of a result in float32, 4 MiB of sum.
ROWS, COLUMNS, STEP = 1024, 1024, 1024
PIECE = 128
"""Rows computed at one time, be the tile the group's alone or not: what all of a tile at once comes to takes minutes to
compile."""


def grouped_product(
    rows: Scaled, weights: Scaled, group_sizes_E: Array, dtype: jnp.dtype, interpret: bool = False
) -> Array:
    """`interpret`: emulated, for tests on a CPU."""
    return _product(rows, weights, group_sizes_E, dtype, transposed=False, interpret=interpret)


def grouped_input_gradient(
    gradient: Scaled, weights: Scaled, group_sizes_E: Array, dtype: jnp.dtype, interpret: bool = False
) -> Array:
    return _product(gradient, weights, group_sizes_E, dtype, transposed=True, interpret=interpret)


def _product(
    rows: Scaled, weights: Scaled, group_sizes_E: Array, dtype: jnp.dtype, transposed: bool, interpret: bool
) -> Array:
    """[M, F]; `transposed`: each matrix of [E, F, D] times rows [M, D]."""
    rows, weights = jax.tree.unflatten(
        jax.tree.structure((rows, weights)), spread_alike(*jax.tree.leaves((rows, weights)))
    )
    of_width = 1 if transposed else 2
    codes_MD, codes_EDF = _whole_lanes(rows.codes, (1,)), _whole_lanes(weights.codes, (1, 2))
    (count, depth), width = codes_MD.shape, codes_EDF.shape[of_width]
    tile, step, columns = tile_of(count, ROWS), _dividing(depth, STEP), tile_of(width, COLUMNS)
    visits, number = visits_of(group_sizes_E, tile, pl.cdiv(count, tile), of_empty=0)
    # The scales of a step as a matrix of their own, which may have fewer rows than a register; those of a matrix, one
    # for each column.
    scales_sSM = rows.scales.T.reshape(depth // step, step // TILE, count)
    scales_EdF = jnp.repeat(weights.scales.swapaxes(1, 2) if transposed else weights.scales, TILE, axis=2)
    scales_EsSF = scales_EdF.reshape(-1, depth // step, step // TILE, width)

    def matrix_block(f, v, d, visits):
        return visits.group_V[v], *((f, d) if transposed else (d, f))

    operands = codes_MD, scales_sSM, codes_EDF, scales_EsSF
    result = jax.ShapeDtypeStruct((count, width), dtype, manual_axis_type=jax.typeof(codes_MD).mat)
    moved = sum(operand.nbytes for operand in operands) + result.size * result.dtype.itemsize
    out = pl.pallas_call(
        functools.partial(_kernel, transposed=transposed),
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(width, columns), number, depth // step),
            in_specs=[
                pl.BlockSpec((tile, step), lambda f, v, d, visits: (visits.tile_V[v], d)),
                pl.BlockSpec((None, step // TILE, tile), lambda f, v, d, visits: (d, 0, visits.tile_V[v])),
                pl.BlockSpec((None, columns, step) if transposed else (None, step, columns), matrix_block),
                pl.BlockSpec((None, None, step // TILE, columns), lambda f, v, d, visits: (visits.group_V[v], d, 0, f)),
            ],
            out_specs=pl.BlockSpec((tile, columns), lambda f, v, d, visits: (visits.tile_V[v], f)),
            scratch_shapes=[pltpu.VMEM((tile, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=32 * 2**20
        ),
        cost_estimate=pl.CostEstimate(flops=2 * count * depth * width, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name=f"{kind_of(group_sizes_E)}_float8",
    )(visits, *operands)
    return out[:, : weights.codes.shape[of_width]]


def _kernel(visits, rows, row_scales, weights, weight_scales, out, total, *, transposed):
    start, stop = rows_of_visit(visits, pl.program_id(1), out.shape[0])
    at = pl.program_id(2)

    @pl.when(at == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def add(index, _):
        place = pl.ds(pl.multiple_of(index * PIECE, PIECE), PIECE)
        of_rows, dims = row_scales[:, place].T, (((1,), (1 if transposed else 0,)), ((), ()))
        for block in range(row_scales.shape[0]):
            within = pl.ds(block * TILE, TILE)
            left, right = rows[place, within], weights[:, within] if transposed else weights[within, :]
            part = jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
            # One after the other: their product may be too small for a float32.
            total[place, :] += part * weight_scales[block, :][None] * of_rows[:, block][:, None]

    jax.lax.fori_loop(start // PIECE, jnp.where(stop > start, pl.cdiv(stop, PIECE), 0), add, None)

    @pl.when(at == pl.num_programs(2) - 1)
    def _():
        # The other rows are other groups', written on the visit before or on the next.
        written = out[...].astype(jnp.float32)
        out[...] = jnp.where(is_within(out.shape, 0, start, stop), total[...], written).astype(out.dtype)


def _whole_lanes(x: Array, dims: tuple[int, ...]) -> Array:
    """Padded with zeros to what registers hold: a no-op for any but tiny models."""
    return jnp.pad(x, [(0, -size % LANES if dim in dims else 0) for dim, size in enumerate(x.shape)])


def _dividing(size: int, most: int) -> int:
    """The largest step of whole tiles that divides `size`."""
    return max(step for step in range(TILE, most + 1, TILE) if size % step == 0)
