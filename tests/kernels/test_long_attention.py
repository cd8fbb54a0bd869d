"""Attention over a long latent cache, block by block, against a loop over queries in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import long_attention
from dsv3_jax.kernels.long_attention import long_absorbed_attention
from dsv3_jax.model.cache import NOWHERE, PagedLatents, block_multiple, cache_length, read_block

RANK, SCALE, PAGE = 5, 0.3, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of 12 entries at most, and 2 tokens of 3 heads."""
    monkeypatch.setattr(long_attention, "LONGEST_BLOCK", 12)
    monkeypatch.setattr(long_attention, "MOST_QUERY_ROWS", 8)


def naive(query_BSHX, entries_BTX, positions_BS) -> np.ndarray:
    query, entries = (np.asarray(each, np.float64) for each in (query_BSHX, entries_BTX))
    out = np.zeros((*query.shape[:3], RANK))
    for row, place in np.ndindex(query.shape[:2]):
        seen = entries[row, : int(positions_BS[row, place]) + 1]
        logits = SCALE * query[row, place] @ seen.T
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[row, place] = weights / weights.sum(axis=1, keepdims=True) @ seen[:, :RANK]
    return out


def inputs(sequence: int, length: int, dtype=jnp.float32):
    random = np.random.default_rng(sequence)
    # Logits of a hundred: without their largest subtracted, they overflow.
    query = jnp.asarray(30 * random.normal(size=(2, sequence, 3, 8)), dtype)
    return query, jnp.asarray(random.normal(size=(2, length, 8)), dtype)


def paged(entries_BTX: jax.Array) -> PagedLatents:
    """The same in shuffled pages of one pool, among others that are NaN."""
    batch, length, width = entries_BTX.shape
    table = np.random.default_rng(0).permutation(2 * batch * length // PAGE)[: batch * length // PAGE]
    pool = jnp.full((2 * batch * length // PAGE, PAGE, width), jnp.nan, entries_BTX.dtype)
    pool = pool.at[table].set(entries_BTX.reshape(-1, PAGE, width))
    return PagedLatents(pool, jnp.asarray(table.reshape(batch, -1), jnp.int32))


@jax.jit
def attended(query_BSHX, cache, positions_BS):
    block_of, multiple = partial(read_block, cache), block_multiple(cache)
    length = cache_length(cache)
    return long_absorbed_attention(query_BSHX, block_of, length, multiple, RANK, SCALE, positions_BS)


# One token; a part of a block and all of it; parts of queries that do not divide; to the last entry of a cache that is
# no multiple of a block; rows far apart.
@pytest.mark.parametrize("starts", [(0, 0), (10, 11), (12, 23), (47, 3), (51, 45)])
@pytest.mark.parametrize("sequence", [1, 5])
@pytest.mark.parametrize("hold", [lambda entries: entries, paged], ids=["rows", "pages"])
def test_queries_see_the_cache_up_to_their_position(hold, sequence, starts):
    query, entries = inputs(sequence, 56)
    positions = np.array(starts)[:, None] + np.arange(sequence)
    expected = naive(query, entries, positions)
    # Nothing after the latest position counts, not even NaN.
    dirty = jnp.where(jnp.arange(56)[None, :, None] > positions.max(axis=1)[:, None, None], jnp.nan, entries)
    np.testing.assert_allclose(attended(query, hold(dirty), positions), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_nowhere_is_finite_and_does_not_matter():
    query, entries = inputs(5, 56)
    positions = np.array([[NOWHERE] * 5, [30, 31, NOWHERE, NOWHERE, NOWHERE]])
    found = np.asarray(attended(query, paged(entries.at[0].set(jnp.nan)), positions))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1, :2], naive(query, entries, np.minimum(positions, 55))[1, :2], atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    query, entries = inputs(1, 56, jnp.bfloat16)
    positions = np.array([[55], [20]])
    found = attended(query, entries, positions)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), naive(query, entries, positions), atol=0.03)
