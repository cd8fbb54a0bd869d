"""Quantisation on TPUs, in Pallas: every number is read once, and written once as a code.

Left to XLA, a scale that 128 numbers beside each other share makes it turn whole arrays around, as float32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.quantization import TILE, Scaled, ScaleFormat, codes_with, largest_of, scales_of
from sharding.collectives import spread_alike

ROW, COLUMN, BLOCK = (1,), (0,), (0, 1)
"""Which numbers of [128, 128] share a scale: along which dims."""
PARAMETERS = pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=48 * 2**20)


def quantized(
    x: Array | Scaled, sharing: tuple[int, ...], scales: ScaleFormat, smallest: float, interpret: bool = False
) -> Scaled:
    """Codes [M, F] of numbers [M, F], or of those that codes with a scale for 128 of a row stand for.

    Args:
        sharing: ROW: scales [M, ceil(F / 128)]. COLUMN: [ceil(M / 128), F]. BLOCK: [ceil(M / 128), ceil(F / 128)].
        interpret: emulated, for tests on a CPU.
    """
    given = [*spread_alike(*x)] if isinstance(x, Scaled) else [x]
    count, width = given[0].shape
    # Rows of whole tiles where they share a scale: what is read beyond the last one is anything.
    missing = -count % TILE if 0 in sharing else 0
    given[0] = jnp.pad(given[0], [(0, 0), (0, -width % TILE)])
    given = [jnp.pad(each, [(0, missing), (0, 0)]) for each in given]
    (rows, columns), tiles = given[0].shape, pl.cdiv(count, TILE)
    vary = jax.typeof(given[0]).mat
    in_place = pl.BlockSpec((TILE, columns), lambda tile: (tile, 0))
    of_rows = pl.BlockSpec((TILE, columns // TILE), lambda tile: (tile, 0))
    across = columns if sharing == COLUMN else columns // TILE
    of_tiles = pl.BlockSpec((None, 1, across), lambda tile: (tile, 0, 0))
    shape = (rows, across) if sharing == ROW else (tiles, 1, across)
    codes, found = pl.pallas_call(
        functools.partial(_quantize, sharing, scales, smallest),
        out_shape=[
            jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn, manual_axis_type=vary),
            jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=vary),
        ],
        grid=(tiles,),
        in_specs=[in_place, of_rows][: len(given)],
        out_specs=[in_place, of_rows if sharing == ROW else of_tiles],
        compiler_params=PARAMETERS,
        cost_estimate=_cost(*given, rows * columns + 4 * math.prod(shape)),
        interpret=interpret,
        name="quantized",
    )(*given)
    # Put into a stack at once, codes would stop the compiler (libtpu 0.0.42): it takes two layouts of them for one.
    codes, found = jax.lax.optimization_barrier((codes, found))
    found = found.reshape(-1, across)[:, : width if sharing == COLUMN else pl.cdiv(width, TILE)]
    return Scaled(codes[:count, :width], found)


def _quantize(sharing, scales, smallest, *refs):
    *given, codes, found = refs
    shared = []
    for tile in range(codes.shape[1] // TILE):
        here = pl.ds(tile * TILE, TILE)
        x = given[0][:, here].astype(jnp.float32)
        if len(given) > 1:
            x = x * given[1][:, tile : tile + 1]
        scale = scales_of(largest_of(x, sharing, keepdims=True), scales, smallest=smallest)
        codes[:, here] = codes_with(x, scale)
        shared.append(scale)
    found[...] = jnp.concatenate(shared, axis=1)


def rows_of(scaled: Scaled, dtype: jnp.dtype, interpret: bool = False) -> Array:
    """Numbers [M, F] of codes [M, F] with a scale for 128 of a row."""
    codes, scales = spread_alike(*scaled)
    count, width = codes.shape
    codes = jnp.pad(codes, [(0, 0), (0, -width % TILE)])
    columns = codes.shape[1]
    in_place = pl.BlockSpec((TILE, columns), lambda tile: (tile, 0))

    def multiply(codes: Any, scales: Any, out: Any) -> None:
        for tile in range(columns // TILE):
            here = pl.ds(tile * TILE, TILE)
            out[:, here] = (codes[:, here].astype(jnp.float32) * scales[:, tile : tile + 1]).astype(dtype)

    out = pl.pallas_call(
        multiply,
        out_shape=jax.ShapeDtypeStruct((count, columns), dtype, manual_axis_type=jax.typeof(codes).mat),
        grid=(pl.cdiv(count, TILE),),
        in_specs=[in_place, pl.BlockSpec((TILE, columns // TILE), lambda tile: (tile, 0))],
        out_specs=in_place,
        compiler_params=PARAMETERS,
        cost_estimate=_cost(codes, scales, count * columns * jnp.dtype(dtype).itemsize),
        interpret=interpret,
        name="values_of_rows",
    )(codes, scales)
    return out[:, :width]


def _cost(*moved: Array | int) -> pl.CostEstimate:
    """No product of matrices; what is read, and the bytes that are written."""
    bytes_ = sum(each if isinstance(each, int) else each.nbytes for each in moved)
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=bytes_)
