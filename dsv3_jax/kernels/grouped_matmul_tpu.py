"""Grouped matmul on TPUs, in Pallas: jax.lax.ragged_dot there reads and multiplies rows that are in no group.

A grid step is a visit of one group to one tile of rows (`grouped_rows`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped_rows import LANES, is_within, piece_by_piece, rows_of_visit, tile_of, visits_of, within
from sharding.collectives import spread_alike

# Tiles of [ROWS, STEP] x [STEP, COLUMNS]. What they move a product is 1 / ROWS + 1 / COLUMNS of an operand: 512
# products a byte in bfloat16, about what a v6e computes in the time of a byte, and twice what a v5p does. In VMEM, with
# two buffers for all that comes and goes: 2 + 2 MiB of operands, 4 MiB of result, 4 MiB of sum. That is 12 MiB of
# the 16 that a kernel has on any TPU. float32 takes half the rows and half the steps: its products are taken apart
# into six of bfloat16, which needs room as well.
ROWS, COLUMNS, STEP = 1024, 1024, 512


def product(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array, interpret: bool = False) -> Array:
    """`interpret`: emulated, for tests on a CPU."""
    return _product(rows_MD, weights_EDF, group_sizes_E, transposed=False, interpret=interpret)


def gradients(
    rows_MD: Array, weights_EDF: Array, group_sizes_E: Array, gradient_MF: Array, interpret: bool = False
) -> tuple[Array, Array]:
    of_rows_MD = _product(gradient_MF, weights_EDF, group_sizes_E, transposed=True, interpret=interpret)
    return of_rows_MD, gradient_of_weights(rows_MD, gradient_MF, group_sizes_E, interpret)


def gradient_of_weights(rows_MD: Array, gradient_MF: Array, group_sizes_E: Array, interpret: bool = False) -> Array:
    rows, gradient = _whole_lanes(*spread_alike(rows_MD, gradient_MF))
    (count, depth), width = rows.shape, gradient.shape[1]
    # Here the rows are what is summed over: tiles of [STEP, ROWS] and [STEP, COLUMNS].
    tile, height, columns = (
        tile_of(count, _most(STEP, rows)),
        tile_of(depth, _most(ROWS, rows)),
        tile_of(width, COLUMNS),
    )
    visits, number = visits_of(group_sizes_E, tile, pl.cdiv(count, tile), of_empty=1)
    result = jax.ShapeDtypeStruct((len(group_sizes_E), depth, width), rows.dtype, manual_axis_type=jax.typeof(rows).mat)
    out = pl.pallas_call(
        _gradient_kernel,
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(depth, height), pl.cdiv(width, columns), number),
            in_specs=[
                pl.BlockSpec((tile, height), lambda d, f, v, visits: (visits.tile_V[v], d)),
                pl.BlockSpec((tile, columns), lambda d, f, v, visits: (visits.tile_V[v], f)),
            ],
            out_specs=pl.BlockSpec((None, height, columns), lambda d, f, v, visits: (visits.group_V[v], d, f)),
            scratch_shapes=[pltpu.VMEM((height, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(count, depth, width, rows, gradient, result.size * result.dtype.itemsize),
        interpret=interpret,
        name="grouped_matmul_gradient",
    )(visits, rows, gradient)
    return out[:, : rows_MD.shape[1], : gradient_MF.shape[1]]


def _product(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array, transposed: bool, interpret: bool) -> Array:
    """[M, F]; `transposed`: each matrix of [E, F, D] times rows [M, D]."""
    rows, weights = _whole_lanes(*spread_alike(rows_MD, weights_EDF))
    (count, depth), width = rows.shape, weights.shape[1 if transposed else 2]
    tile, step, columns = tile_of(count, _most(ROWS, rows)), tile_of(depth, _most(STEP, rows)), tile_of(width, COLUMNS)
    visits, number = visits_of(group_sizes_E, tile, pl.cdiv(count, tile), of_empty=0)

    def matrix_block(f, v, d, visits):
        return visits.group_V[v], *((f, d) if transposed else (d, f))

    out = pl.pallas_call(
        functools.partial(_product_kernel, depth=depth, step=step, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((count, width), rows.dtype, manual_axis_type=jax.typeof(rows).mat),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(width, columns), number, pl.cdiv(depth, step)),
            in_specs=[
                pl.BlockSpec((tile, step), lambda f, v, d, visits: (visits.tile_V[v], d)),
                pl.BlockSpec((None, columns, step) if transposed else (None, step, columns), matrix_block),
            ],
            out_specs=pl.BlockSpec((tile, columns), lambda f, v, d, visits: (visits.tile_V[v], f)),
            scratch_shapes=[pltpu.VMEM((tile, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(count, depth, width, rows, weights, rows.dtype.itemsize * count * width),
        interpret=interpret,
        name="grouped_matmul",
    )(visits, rows, weights)
    return out[:, : weights_EDF.shape[1 if transposed else 2]]


def _product_kernel(visits, rows, weights, out, total, *, depth, step, transposed):
    start, stop = rows_of_visit(visits, pl.program_id(1), out.shape[0])
    at = pl.program_id(2)

    @pl.when(at == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def add(place):
        left, right = rows[place, :], weights[...]
        if depth % step:  # what lies past the end of a dim is not zero, and may be NaN
            left, right = within(left, 1, 0, depth - at * step), within(right, transposed, 0, depth - at * step)
        total[place, :] += _dot(left, right, 1, 1 if transposed else 0)

    piece_by_piece(start, stop, out.shape[0], add)

    @pl.when(at == pl.num_programs(2) - 1)
    def _():
        # The other rows are other groups', written on the visit before or on the next.
        written = out[...].astype(jnp.float32)
        out[...] = jnp.where(is_within(out.shape, 0, start, stop), total[...], written).astype(out.dtype)


def _gradient_kernel(visits, rows, gradient, out, total):
    visit, tile = pl.program_id(2), rows.shape[0]
    group, begin = visits.group_V[visit], visits.tile_V[visit] * tile
    start, stop = rows_of_visit(visits, visit, tile)

    @pl.when(begin <= visits.start_E[group])
    def _():
        total[...] = jnp.zeros_like(total)

    def add(place, first=None):
        left, right = rows[place, :], gradient[place, :]
        if first is not None:  # both: a row of another group, or of none, may be NaN on either side
            left, right = (within(x, 0, start - first, stop - first) for x in (left, right))
        total[...] += _dot(left, right, 0, 0)

    piece_by_piece(start, stop, tile, add, masked=True)

    @pl.when(begin + tile >= visits.stop_E[group])
    def _():
        out[...] = total[...].astype(out.dtype)


def _dot(left, right, of_left, of_right):
    """Product over one dim of each, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((of_left,), (of_right,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)


def _whole_lanes(rows_MD: Array, other: Array) -> tuple[Array, Array]:
    """Padded with zeros to what registers hold: a no-op for any but tiny models. Rows are left as many as they are."""
    before = [(0, 0)] * (other.ndim - 2) + [(0, -other.shape[-2] % LANES if other.ndim == 3 else 0)]
    rows_MD = jnp.pad(rows_MD, [(0, 0), (0, -rows_MD.shape[1] % LANES)])
    return rows_MD, jnp.pad(other, [*before, (0, -other.shape[-1] % LANES)])


def _most(size: int, array: Array) -> int:
    return size * 2 // array.dtype.itemsize


def _cost(rows: int, depth: int, width: int, left: Array, right: Array, written: int) -> pl.CostEstimate:
    """Of all rows: how many of them are in a group is not known when compiling."""
    moved = left.nbytes + right.nbytes + written
    return pl.CostEstimate(flops=2 * rows * depth * width, transcendentals=0, bytes_accessed=moved)
