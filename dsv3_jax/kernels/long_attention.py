"""Attention of absorbed queries over a long latent cache: block by block, with a running softmax.

    largest' = max(largest, max_t logit_t)
    total'   = total * exp(largest - largest') + sum_t exp(logit_t - largest')
    mixed'   = mixed * exp(largest - largest') + sum_t exp(logit_t - largest') entry_t

as in FlashAttention (arXiv 2205.14135). A row's blocks are counted at run time, up to its latest position: what is
computed and read grows with the positions in use, not with the cache's length, so that one compiled shape serves all of
them. Nothing of the cache is copied but the block at hand.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from dsv3_jax.kernels.attention_blocks import product
from sharding.collectives import spread_like

# Up to here `absorbed_attention` is as fast or faster for a token: a step of the loop costs as much as some hundred
# entries.
LONGEST_WHOLE = 8192
MOST_WHOLE_LOGITS = 2**22

# On a CPU a block's logits, float32, should stay in a core's cache between their two products, and a product of fewer
# than some hundred rows is slow; with few rows a block is long, so that there are few steps.
MOST_QUERY_ROWS = 2048
MOST_BLOCK_LOGITS = 2**20
LONGEST_BLOCK = 4096


def is_long(queries: int, length: int) -> bool:
    """Whether `queries` rows (tokens times heads) over `length` entries are taken block by block."""
    return length > LONGEST_WHOLE or queries * length > MOST_WHOLE_LOGITS


def long_absorbed_attention(
    query_BSHX: Array,
    block_of: Callable[[Array, Array, int], Array],
    length: int,
    multiple: int,
    rank: int,
    scale: float,
    positions_BS: Array,
) -> Array:
    """What `absorbed_attention` computes, in bounded memory.

    Args:
        query_BSHX: [B, S, H, C + R].
        block_of: `block_of(row, start, Z)`: a row's entries start .. start + Z - 1, [Z, X]; start and Z are multiples
            of `multiple` and the block lies within the cache. Entries after the latest position may be anything.
        length: T, a multiple of `multiple`.
        rank: C.
        scale: factor on the logits.
        positions_BS: int32; a query sees the entries up to and including its own position. One at a position outside
            the cache counts for nothing, and its result is any finite number.

    Returns:
        [B, S, H, C] in the type of the queries. Logits, softmax and sums are float32.
    """
    batch, new, heads, width = query_BSHX.shape
    parts = -(-new * heads // max(MOST_QUERY_ROWS, heads))
    tokens = -(-new // parts)
    padding = (0, parts * tokens - new)
    query_BSHX = jnp.pad(query_BSHX, ((0, 0), padding, (0, 0), (0, 0)))
    positions_BS = jnp.pad(positions_BS, ((0, 0), padding), constant_values=length)
    size = min(LONGEST_BLOCK, MOST_BLOCK_LOGITS // (tokens * heads), length)
    size = max(size // multiple, 1) * multiple

    def of_part(part: tuple[Array, Array, Array]) -> Array:
        row, query_MX, positions_s = part
        return _attended(query_MX, lambda start: block_of(row, start, size), size, length, scale, positions_s)

    # One row after the other, each with as many blocks as it needs: in a batch of all of them the longest would decide.
    rows_N = jnp.repeat(jnp.arange(batch), parts)
    queries_NMX = query_BSHX.reshape(batch * parts, tokens * heads, width)
    mixed_NMX = jax.lax.map(of_part, (rows_N, queries_NMX, positions_BS.reshape(batch * parts, tokens)))
    return mixed_NMX.reshape(query_BSHX.shape)[:, :new, :, :rank]


def _attended(
    query_MX: Array, block_of: Callable[[Array], Array], size: int, length: int, scale: float, positions_s: Array
) -> Array:
    """[M, X], of queries of M / s heads of each of s tokens of one row."""
    rows = query_MX.shape[0]
    position_M1 = jnp.repeat(positions_s, rows // positions_s.shape[0])[:, None]
    end = jnp.where(positions_s < length, positions_s + 1, 0).max()
    every_sees = jnp.minimum(positions_s.min() + 1, end)

    def add(index: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        largest_M1, total_M1, mixed_MX = carry
        # The last block ends where the cache does, and may begin with entries of the block before.
        start = jnp.minimum(index * size, length - size)
        block_ZX = block_of(start)
        if masked:
            place_Z = start + jnp.arange(size)
            # What lies after the latest position must not count, and no weight of 0 undoes a NaN.
            block_ZX = jnp.where((place_Z < end)[:, None], block_ZX, 0)
        logits_MZ = product("mx,zx->mz", query_MX, block_ZX, jnp.float32) * scale
        if masked:
            visible_MZ = (place_Z <= position_M1) & (place_Z >= index * size)
            logits_MZ = jnp.where(visible_MZ, logits_MZ, -jnp.inf)
        new_M1 = jnp.maximum(largest_M1, logits_MZ.max(axis=1, keepdims=True))
        weights_MZ, old_M1 = jnp.exp(logits_MZ - new_M1), jnp.exp(largest_M1 - new_M1)
        total_M1 = total_M1 * old_M1 + weights_MZ.sum(axis=1, keepdims=True)
        of_block_MX = product("mz,zx->mx", weights_MZ.astype(query_MX.dtype), block_ZX, jnp.float32)
        return new_M1, total_M1, mixed_MX * old_M1 + of_block_MX

    least = jnp.finfo(jnp.float32).min  # not -inf, whose difference to itself is NaN
    empty = jnp.full((rows, 1), least), jnp.zeros((rows, 1)), jnp.zeros(query_MX.shape)
    like = query_MX, positions_s, block_of(jnp.int32(0))
    carry = (spread_like(empty[0], *like), spread_like(empty[1], *like), spread_like(empty[2], *like))
    # Only the blocks at the end hold what some query must not see.
    whole = every_sees // size
    carry = jax.lax.fori_loop(0, whole, lambda index, carry: add(index, carry, masked=False), carry)
    carry = jax.lax.fori_loop(whole, -(-end // size), lambda index, carry: add(index, carry, masked=True), carry)
    _, total_M1, mixed_MX = carry
    return (mixed_MX / jnp.where(total_M1 > 0, total_M1, 1)).astype(query_MX.dtype)
