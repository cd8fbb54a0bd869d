"""Where decoding keeps latents: an array of rows, or pages that a table deals out to rows. One contract for both.

`write(cache, latent_BSX, positions_BS)` returns the cache with new tokens' latents at their positions, and
`read(cache, positions_BS)` what attention of tokens at these positions may look at: [B, T, X], entry t at position t,
finite wherever no token up to the latest of these positions has written anything else. A position outside the cache
is not written.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

NOWHERE = 1 << 30
"""A position outside every cache."""


class PagedLatents(NamedTuple):
    """A pool of pages of Z tokens each that several rows share; a page belongs to the rows in whose table it stands."""

    pages_YZX: Array
    table_BG: Array
    """int32: page g holds a row's positions g * Z .. g * Z + Z - 1. Y or more: no page; it is not written, and reads
    as zeros."""


# [B, T, X] or pages; X = C + R.
Latents = Array | PagedLatents


def write(cache: Latents, latent_BSX: Array, positions_BS: Array) -> Latents:
    rows_B1 = jnp.arange(latent_BSX.shape[0])[:, None]
    if not isinstance(cache, PagedLatents):
        return cache.at[rows_B1, positions_BS].set(latent_BSX.astype(cache.dtype), mode="drop")
    pages_YZX, table_BG = cache
    pages, size, _ = pages_YZX.shape
    page_BS = table_BG.at[rows_B1, positions_BS // size].get(mode="fill", fill_value=pages)
    written_YZX = pages_YZX.at[page_BS, positions_BS % size].set(latent_BSX.astype(pages_YZX.dtype), mode="drop")
    return cache._replace(pages_YZX=written_YZX)


def read(cache: Latents, positions_BS: Array) -> Array:
    if not isinstance(cache, PagedLatents):
        return cache
    pages_YZX, table_BG = cache
    entries_BGZX = pages_YZX.at[table_BG].get(mode="fill", fill_value=0)
    entries_BTX = entries_BGZX.reshape(table_BG.shape[0], -1, pages_YZX.shape[-1])
    # What an earlier owner left in a page must not count, and no weight of 0 undoes a NaN.
    length = entries_BTX.shape[1]
    latest_B = jnp.where(positions_BS < length, positions_BS, -1).max(axis=1)
    return jnp.where((jnp.arange(length) <= latest_B[:, None])[..., None], entries_BTX, 0)
