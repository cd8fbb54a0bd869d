"""The grid of causal attention on TPUs: pairs of a block of queries and a block of keys that it sees, and no others."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128

# Positions of a block, at 2 bytes a number, and of those of its keys that are computed at one time. [1024, 512]
# logits in float32 are 2 MiB, blocks in and out, with two buffers each, and sums 5 more; compiled, with V3's head dims,
# none takes more than 12 MiB (on v4; 8 on later ones) of the 16 MiB of VMEM that a kernel has on any TPU.
BLOCK, PIECE = 1024, 512


class Blocked(NamedTuple):
    """An array cut into blocks of positions: [B, H, S, d], or [B, H, 1, S] of one number each."""

    array: Any
    """Of a result, its shape and type are enough."""
    of_keys: bool = False
    """Its blocks are those of the keys, otherwise those of the queries."""


class Place(NamedTuple):
    """Where in the grid a kernel is."""

    first: Array
    """At the first of the blocks it sums over."""
    diagonal: Array
    """At the last of them, where queries and keys begin at the same position."""
    block: int
    by_key: bool
    segments: tuple[Any, Any] | None
    """Ids, of what the sum is for [block, LANES], and of what is summed over [1, block]."""

    def each_piece(self, add: Callable[..., None]) -> None:
        """add(queries, keys, hidden) for pieces of the keys and those of the block's queries that see any of them.

        hidden(x, by) is x where a query sees a key, elsewhere `by`; x is [queries, keys], or by key [keys, queries].
        """
        piece = self.block if self.block <= PIECE else self.block // 2

        def pieces(diagonal: bool) -> None:
            for start in range(0, self.block, piece):
                queries, keys = slice(start if diagonal else 0, self.block), slice(start, start + piece)
                add(queries, keys, functools.partial(self._hidden, queries, keys, diagonal))

        pl.when(self.diagonal)(lambda: pieces(True))
        pl.when(jnp.logical_not(self.diagonal))(lambda: pieces(False))

    def _hidden(self, queries: slice, keys: slice, diagonal: bool, x: Array, by: float) -> Array:
        if diagonal:
            row, column = (jax.lax.broadcasted_iota(jnp.int32, x.shape, dim) for dim in (0, 1))
            x = jnp.where(row <= column if self.by_key else column <= row, x, by)
        if self.segments is not None:
            column, line = self.segments
            rows, columns = (keys, queries) if self.by_key else (queries, keys)
            x = jnp.where(across(column[rows, :], x.shape[1]) == line[:, columns], x, by)
        return x


def over_visible_blocks(
    kernel: Callable[..., None],
    inputs: Sequence[Blocked],
    outputs: Sequence[Blocked],
    segment_ids_BS: Array | None,
    block: int,
    by_key: bool,
    scratch: Sequence[tuple[int, int]],
    cost: pl.CostEstimate,
    interpret: bool,
    name: str,
) -> Sequence[Array]:
    """The kernel, called for every pair of blocks with its Place, then blocks of inputs and of outputs, and scratch.

    Args:
        block: positions of one; the rows are a multiple of it.
        by_key: all queries' blocks after each other for a block of keys, otherwise all keys' for one of queries.
        scratch: shapes, float32.
    """
    batch, heads, sequence, _ = inputs[0].array.shape
    ids, blocks = [], sequence // block
    if segment_ids_BS is not None:
        ids_B11S = jnp.pad(segment_ids_BS, [(0, 0), (0, sequence - segment_ids_BS.shape[1])])[:, None, None]
        ids = [Blocked(ids_B11S.astype(jnp.int32), by_key), Blocked(ids_B11S.astype(jnp.int32), not by_key)]

    def specification(blocked: Blocked) -> pl.BlockSpec:
        each_head, lines = blocked.array.shape[1] == heads, blocked.array.shape[2] == 1

        def index(b, h, fold, step):
            outer, inner = _pair(fold, step, blocks, by_key)
            at = outer if blocked.of_keys == by_key else inner
            return (b, h if each_head else 0, *((0, at) if lines else (at, 0)))

        return pl.BlockSpec((None, None, 1, block) if lines else (None, None, block, blocked.array.shape[3]), index)

    def body(*references: Any) -> None:
        outer, inner = _pair(pl.program_id(2), pl.program_id(3), blocks, by_key)
        first, segments = inner == (blocks - 1 if by_key else 0), None
        if ids:
            mine, others, *references, column = references  # type: ignore[assignment]
            segments = column, others

            @pl.when(first)
            def _():
                column[...] = as_column(mine[...])

        kernel(Place(first, inner == outer, block, by_key, segments), *references)

    varying = jax.typeof(inputs[0].array).mat
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.array.shape, x.array.dtype, manual_axis_type=varying) for x in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(batch, heads, *_folded(blocks)),
            in_specs=[specification(x) for x in (*ids, *inputs)],
            out_specs=[specification(x) for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch]
            + [pltpu.VMEM((block, LANES), jnp.int32) for _ in ids[:1]],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*(x.array for x in (*ids, *inputs)))


def block_of(x_BHSd: Array) -> int:
    """Positions of a block: as few as make no block more than the most would, in whole pieces of whole registers."""
    sequence, most = x_BHSd.shape[2], BLOCK * 2 // x_BHSd.dtype.itemsize
    block = pl.cdiv(sequence, pl.cdiv(sequence, most))
    multiple = LANES if block <= PIECE else 2 * LANES
    return pl.cdiv(block, multiple) * multiple


# Of n blocks of queries, block i sees i + 1 of keys. Blocks i and n - 1 - i together see n + 1, whatever i is: folded,
# the triangle is a rectangle, which a grid can be. If n is odd, block i goes with block n - 2 - i, and the last alone.


def _folded(blocks: int) -> tuple[int, int]:
    odd = blocks % 2
    return (blocks + odd) // 2, blocks + 1 - odd


def _pair(fold, step, blocks: int, by_key: bool):
    """A block of queries and one of keys that it sees, from the first on; by key the same triangle from its other
    corner: a block of keys and one of queries that see it, from the last on."""
    odd = blocks % 2
    short = fold + 1 - odd
    outer = jnp.where(step < short, fold - odd, blocks - 1 - fold)
    inner = jnp.where(step < short, step, step - short)
    return (blocks - 1 - outer, blocks - 1 - inner) if by_key else (outer, inner)


def as_column(line: Array) -> Array:
    """[1, n] as [n, LANES], the same in every lane."""
    return jnp.broadcast_to(line, (LANES, line.shape[1])).T


def across(column: Array, width: int) -> Array:
    """[n, LANES], the same in every lane, as [n, width]."""
    return jnp.tile(column, (1, width // LANES))
