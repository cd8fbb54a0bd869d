"""Attention cores against softmax written out in float64, one query at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.attention import absorbed_attention, causal_attention

SCALE = 0.37


def _inputs(
    sequence: int, dtype: jnp.dtype = jnp.float32, batch: int = 2, heads: int = 3, head: int = 6, value: int = 4
):
    random = np.random.default_rng(sequence)
    shapes = ((batch, sequence, heads, head), (batch, sequence, heads, head), (batch, sequence, heads, value))
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


def _naive(query, key, value, segments=None) -> np.ndarray:
    query, key, value = (np.asarray(each, np.float64) for each in (query, key, value))
    batch, sequence, heads, _ = query.shape
    segments = np.zeros((batch, sequence)) if segments is None else np.asarray(segments)
    out = np.zeros((batch, sequence, heads, value.shape[-1]))
    for row, place in np.ndindex(batch, sequence):
        seen = np.flatnonzero(segments[row, : place + 1] == segments[row, place])
        logits = SCALE * np.einsum("hd,thd->ht", query[row, place], key[row, seen])
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[row, place] = np.einsum("ht,thv->hv", weights, value[row, seen])
    return out


def _dense(query, key, value, segments):
    """All logits at once, for autodiff."""
    sequence = query.shape[1]
    visible = jnp.tril(jnp.ones((sequence, sequence), bool)) & (segments[:, :, None] == segments[:, None, :])
    logits = jnp.einsum("bshd,bthd->bhst", query, key, precision="highest") * SCALE
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -1e30), axis=-1)
    return jnp.einsum("bhst,bthv->bshv", weights, value, precision="highest")


@jax.jit
def _causal(query, key, value, segments=None):
    return causal_attention(query, key, value, SCALE, segments)


@pytest.mark.parametrize("sequence", [1, 2, 63, 64, 65, 130, 512, 600])
def test_a_row_attends_to_itself_and_what_came_before(sequence):
    inputs = _inputs(sequence)
    found = _causal(*inputs)
    assert found.shape == (2, sequence, 3, 4) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, _naive(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequence", [5, 65, 130])
def test_segments_are_isolated(sequence):
    inputs = _inputs(sequence)
    lengths = np.random.default_rng(0).integers(0, 2, (2, sequence)) * (np.arange(sequence) % 7 == 0)
    segments = (1 + np.cumsum(lengths, axis=1)).astype(np.int32)
    segments[1, sequence // 2 :] = 0  # padding: it may attend to anything but must stay finite
    np.testing.assert_allclose(_causal(*inputs, segments), _naive(*inputs, segments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sequence", "dtype", "tolerance"), [(7, "float32", 2e-5), (300, "float32", 2e-5), (130, "bfloat16", 0.03)]
)
def test_gradients_are_those_of_dense_attention(sequence, dtype, tolerance):
    inputs = _inputs(sequence, jnp.dtype(dtype))
    segments = jnp.asarray(np.arange(sequence) // 50 + np.zeros((2, 1)), jnp.int32)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=inputs[2].shape), dtype)

    def gradients(core, inputs):
        return jax.jit(jax.grad(lambda *inputs: (core(*inputs, segments) * cotangent).sum(), (0, 1, 2)))(*inputs)

    expected = gradients(_dense, [each.astype(jnp.float32) for each in inputs])
    for found, of_dense, value in zip(gradients(_causal, inputs), expected, inputs, strict=True):
        assert found.dtype == value.dtype
        np.testing.assert_allclose(found.astype(jnp.float32), of_dense, rtol=tolerance, atol=tolerance)


def test_the_future_cannot_be_felt_even_as_a_nan():
    query, key, value = _inputs(130)
    found = _causal(query, key, value)
    later = _causal(query, key.at[:, 70:].set(jnp.nan), value.at[:, 70:].set(1e4))
    np.testing.assert_array_equal(found[:, :64], later[:, :64])
    assert bool(jnp.isnan(later[:, 70:]).all())


def test_large_logits_neither_overflow_nor_blur():
    query, key, value = (each.astype(jnp.bfloat16) for each in _inputs(66))
    found = _causal(300 * query, 300 * key, value)
    expected = _naive(300 * query, 300 * key, value)
    assert found.dtype == jnp.bfloat16
    # Logits in bfloat16 would be off by hundreds and choose other keys.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.02)


def _absorbed_inputs(sequence: int, cache: int, dtype: jnp.dtype = jnp.float32):
    random = np.random.default_rng(cache)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    return draw(2, sequence, 3, 8), draw(2, cache, 8)


def _naive_absorbed(query, cache, rank: int, positions) -> np.ndarray:
    query, cache, positions = (np.asarray(each, np.float64) for each in (query, cache, positions))
    out = np.zeros((*query.shape[:3], rank))
    for row, place in np.ndindex(query.shape[:2]):
        seen = cache[row, : int(positions[row, place]) + 1]
        logits = SCALE * query[row, place] @ seen.T
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[row, place] = weights / weights.sum(axis=1, keepdims=True) @ seen[:, :rank]
    return out


@pytest.mark.parametrize(
    ("cache", "positions"),
    [
        (1, [[0], [0]]),
        (9, [[8], [3]]),  # rows of different lengths
        (70, [[5, 6, 7], [67, 68, 69]]),
        (6, [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
    ],
)
def test_absorbed_queries_see_the_cache_up_to_their_position(cache, positions):
    positions = np.array(positions, np.int32)
    query, entries = _absorbed_inputs(positions.shape[1], cache)
    found = jax.jit(lambda *inputs: absorbed_attention(inputs[0], inputs[1], 5, SCALE, inputs[2]))(
        query, entries, positions
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, _naive_absorbed(query, entries, 5, positions), rtol=1e-5, atol=1e-5)


def test_absorbed_attention_is_causal_attention_with_one_shared_key():
    query, entries = _absorbed_inputs(6, 6)
    positions = jnp.tile(jnp.arange(6), (2, 1))
    key = jnp.broadcast_to(entries[:, :, None], (2, 6, 3, 8))
    expected = _causal(query, key, key[..., :5])
    np.testing.assert_allclose(absorbed_attention(query, entries, 5, SCALE, positions), expected, rtol=1e-5, atol=1e-6)


def test_a_cache_longer_than_what_is_written_changes_nothing():
    query, entries = _absorbed_inputs(2, 9)
    positions = np.array([[3, 4], [1, 2]], np.int32)
    dirty = entries.at[0, 5:].set(1e3).at[1, 3:].set(1e3)
    clean, other = (absorbed_attention(query, cache, 5, SCALE, positions) for cache in (entries, dirty))
    np.testing.assert_array_equal(clean, other)


def test_absorbed_bfloat16_keeps_its_type_and_float32_softmax():
    query, entries = _absorbed_inputs(1, 300, jnp.bfloat16)
    positions = np.array([[299], [150]], np.int32)
    found = absorbed_attention(query, entries, 5, SCALE, positions)
    assert found.dtype == jnp.bfloat16
    expected = _naive_absorbed(query, entries, 5, positions)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.02)
