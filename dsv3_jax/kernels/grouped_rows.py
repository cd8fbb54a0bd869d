"""Rows sorted by group in a Pallas kernel: which group has a part in which tile of rows.

Rows are taken in tiles. A grid step is a visit of one group to one tile, so that a tile on the border of two groups is
visited by both; the number of visits is known only at run time, and is the grid's size. Of the tile, a visit computes
the pieces of PIECE rows that the group has a part in.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

LANES = 128
PIECE = 256
"""Rows computed at one time where a tile is not the group's alone: enough to hide the loading of a matrix unit."""


class Visits(NamedTuple):
    """Which group comes to which tile, visit by visit, and the rows of each group."""

    group_V: Array
    tile_V: Array
    start_E: Array
    stop_E: Array


def visits_of(group_sizes_E: Array, tile: int, tiles: int, of_empty: int) -> tuple[Visits, Array]:
    """The visits in order of the groups, and how many they are; to an empty group belong `of_empty`."""
    stop_E = jnp.cumsum(group_sizes_E)
    start_E = stop_E - group_sizes_E
    first_E = start_E // tile
    number_E = jnp.where(group_sizes_E > 0, -(-stop_E // tile) - first_E, of_empty)
    until_E = jnp.cumsum(number_E)
    visit_V = jnp.arange(tiles + len(group_sizes_E))
    group_V = jnp.minimum(jnp.sum(until_E <= visit_V[:, None], axis=1), len(group_sizes_E) - 1)
    # An empty group may stand at the end of the last tile.
    tile_V = jnp.minimum((first_E - until_E + number_E)[group_V] + visit_V, tiles - 1)
    visits = Visits(*(x.astype(jnp.int32) for x in (group_V, tile_V, start_E, stop_E)))
    # A grid of no step at all is nothing to rely on; a visit of an empty group computes nothing.
    return visits, jnp.maximum(until_E[-1], 1).astype(jnp.int32)


def rows_of_visit(visits, visit, tile):
    """The rows of the tile that are the visiting group's, counted within the tile."""
    group, begin = visits.group_V[visit], visits.tile_V[visit] * tile
    return jnp.maximum(visits.start_E[group] - begin, 0), jnp.minimum(visits.stop_E[group] - begin, tile)


def piece_by_piece(start, stop, tile, add, masked=False):
    """`add` for the whole tile if all of it is the group's, otherwise for each piece with a row of the group in it."""
    whole = (start == 0) & (stop == tile)
    piece = math.gcd(tile, PIECE)

    @pl.when(whole)
    def _():
        add(pl.ds(0, tile))

    @pl.when(jnp.logical_not(whole))
    def _():
        def body(index, _):
            first = pl.multiple_of(index * piece, piece)
            add(pl.ds(first, piece), *([first] if masked else []))

        jax.lax.fori_loop(start // piece, jnp.where(stop > start, pl.cdiv(stop, piece), 0), body, None)


def is_within(shape, dim, start, stop):
    place = jax.lax.broadcasted_iota(jnp.int32, shape, dim)
    return (place >= start) & (place < stop)


def within(x, dim, start, stop):
    """0 outside of [start, stop) along `dim`. Selected in float32: not every TPU selects in bfloat16."""
    return jnp.where(is_within(x.shape, dim, start, stop), x.astype(jnp.float32), 0).astype(x.dtype)


def tile_of(size: int, most: int) -> int:
    """The smallest tile, in whole registers, that takes no more of them than `most` does."""
    return pl.cdiv(pl.cdiv(size, pl.cdiv(size, most)), LANES) * LANES
