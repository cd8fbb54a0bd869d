"""Where decoding keeps latents: an array of rows, or pages that a table deals out to rows. One contract for both.

`write(cache, latent_BSX, positions_BS)` returns the cache with new tokens' latents at their positions, and
`read(cache, positions_BS)` what attention of tokens at these positions may look at: [B, T, X], entry t at position t,
finite wherever no token up to the latest of these positions has written anything else. A position outside the cache
is not written. Of a long cache `read` would copy too much: `read_block` gives a row's entries a block at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sharding.mesh import platform

NOWHERE = 1 << 30
"""A position outside every cache."""


class PagedLatents(NamedTuple):
    """A pool of pages of Z tokens each that several rows share; a page belongs to the rows in whose table it stands."""

    pages_YZX: Array
    table_BG: Array
    """int32: page g holds a row's positions g * Z .. g * Z + Z - 1. Y or more: no page; it is not written, and reads
    as zeros."""


# [B, T, X] or pages; X = C + R. What is in them is what `empty` holds latents in.
Latents = Array | PagedLatents


def empty(*shape: int, dtype: str) -> Array:
    """Rows or pages for latents of this type, all zeros."""
    held = jnp.dtype(dtype)
    # XLA:CPU scatters no bfloat16: for one entry it would convert the whole cache to float32 and back. Its bits it can.
    if held == jnp.bfloat16 and platform() == "cpu":
        held = jnp.dtype(jnp.uint16)
    return jnp.zeros(shape, held)


def _as_held(latent: Array, held: jnp.dtype) -> Array:
    if held == jnp.uint16:
        return jax.lax.bitcast_convert_type(latent.astype(jnp.bfloat16), held)
    return latent.astype(held)


def _as_latent(held: Array) -> Array:
    return jax.lax.bitcast_convert_type(held, jnp.bfloat16) if held.dtype == jnp.uint16 else held


def write(cache: Latents, latent_BSX: Array, positions_BS: Array) -> Latents:
    rows_B1 = jnp.arange(latent_BSX.shape[0])[:, None]
    if not isinstance(cache, PagedLatents):
        return cache.at[rows_B1, positions_BS].set(_as_held(latent_BSX, cache.dtype), mode="drop")
    pages_YZX, table_BG = cache
    pages, size, _ = pages_YZX.shape
    page_BS = table_BG.at[rows_B1, positions_BS // size].get(mode="fill", fill_value=pages)
    latent_BSX = _as_held(latent_BSX, pages_YZX.dtype)
    return cache._replace(pages_YZX=pages_YZX.at[page_BS, positions_BS % size].set(latent_BSX, mode="drop"))


def read(cache: Latents, positions_BS: Array) -> Array:
    if not isinstance(cache, PagedLatents):
        return _as_latent(cache)
    pages_YZX, table_BG = cache
    entries_BGZX = pages_YZX.at[table_BG].get(mode="fill", fill_value=0)
    entries_BTX = entries_BGZX.reshape(table_BG.shape[0], -1, pages_YZX.shape[-1])
    # What an earlier owner left in a page must not count, and no weight of 0 undoes a NaN.
    length = entries_BTX.shape[1]
    latest_B = jnp.where(positions_BS < length, positions_BS, -1).max(axis=1)
    return _as_latent(jnp.where((jnp.arange(length) <= latest_B[:, None])[..., None], entries_BTX, 0))


def cache_length(cache: Latents) -> int:
    """T."""
    return cache.table_BG.shape[1] * block_multiple(cache) if isinstance(cache, PagedLatents) else cache.shape[1]


def block_multiple(cache: Latents) -> int:
    """What the starts and sizes of blocks must be multiples of."""
    return cache.pages_YZX.shape[1] if isinstance(cache, PagedLatents) else 1


def read_block(cache: Latents, row: Array, start: Array, size: int) -> Array:
    """Entries start .. start + size - 1 of one row, [size, X]; those that nothing was written to may be anything."""
    if not isinstance(cache, PagedLatents):
        return _as_latent(jax.lax.dynamic_slice(cache, (row, start, 0), (1, size, cache.shape[2]))[0])
    pages_YZX, table_BG = cache
    of_page = block_multiple(cache)
    pages_1g = jax.lax.dynamic_slice(table_BG, (row, start // of_page), (1, size // of_page))
    return _as_latent(pages_YZX.at[pages_1g[0]].get(mode="fill", fill_value=0).reshape(size, -1))
