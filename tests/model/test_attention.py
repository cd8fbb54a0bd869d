"""Latent attention: the whole row against a loop over heads and positions, and the cached paths against the row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.model.attention import MultiHeadLatentAttention
from dsv3_jax.model.functional import abstract_trees, skeleton_of
from dsv3_jax.model.rope import rotation
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig
from tests.reference import transformer as reference
from tests.reference.weights import random_module, random_weights

YARN = {"yarn_factor": 40.0, "yarn_original_length": 64, "yarn_mscale": 0.8}


@pytest.fixture
def attend(call):
    """`attend(model, length)`: our output and latents of one random row, and the reference's."""

    def compare(model: ModelConfig, length: int, first_position: int = 0, segments: np.ndarray | None = None):
        x_SD = np.random.default_rng(length).standard_normal((length, model.width))
        attention, weights = random_module(MultiHeadLatentAttention, model)
        positions = first_position + np.arange(length)
        row = reference.Row(np.zeros(length), positions, np.ones(length) if segments is None else segments)
        wanted = reference.attention(x_SD, row, weights, model)
        cached = [
            reference.cached(x_D, position, weights, model) for x_D, position in zip(x_SD, positions, strict=True)
        ]
        by = rotation(model, jnp.asarray(positions)[None])
        segment_ids_BS = None if segments is None else segments[None]
        ours, latents = call(attention, np.asarray(x_SD, np.float32)[None], by, segment_ids_BS)
        return np.asarray(ours[0]), np.asarray(latents[0]), wanted, np.array([np.concatenate(both) for both in cached])

    return compare


# One token, a block of queries and one more, and a row of several blocks.
@pytest.mark.parametrize("length", [1, 65, 600])
def test_a_row_of_any_length_is_attended_as_in_the_equations(tiny_model, attend, length):
    ours, _, wanted, _ = attend(tiny_model(), length)
    np.testing.assert_allclose(ours, wanted, atol=2e-5 * wanted.std())


@pytest.mark.parametrize(
    "changes",
    [{"query_latent": None}, YARN, {"heads": 1}, {"norm_epsilon": 0.5}, {"latent_norm_epsilon": 0.5}],
    ids=["no_query_latent", "yarn", "one_head", "large_block_epsilon", "large_latent_epsilon"],
)
def test_every_shape_is_attended_as_in_the_equations(tiny_model, attend, changes):
    ours, _, wanted, _ = attend(tiny_model(**changes), 20, first_position=50)
    np.testing.assert_allclose(ours, wanted, atol=2e-5 * wanted.std())


@pytest.mark.parametrize("length", [12, 130])
def test_segments_do_not_see_each_other(tiny_model, attend, length):
    segments = np.sort(np.random.default_rng(0).integers(1, 5, length))
    ours, _, wanted, _ = attend(tiny_model(), length, segments=segments)
    np.testing.assert_allclose(ours, wanted, atol=2e-5 * wanted.std())


def test_trap_A2_the_cache_is_the_normed_latent_and_the_rotated_key_without_a_norm(tiny_model, attend):
    model = tiny_model(**YARN)
    _, latents, _, cached = attend(model, 9, first_position=30)
    assert latents.shape == (9, model.key_value_latent + model.rope_head_dim)
    np.testing.assert_allclose(latents, cached, atol=1e-4)


def test_trap_A3_no_query_latent_means_no_query_norm(tiny_model):
    parameters, _ = abstract_trees(skeleton_of(tiny_model(query_latent=None)))
    names = set(parameters["moe_blocks"]["attention"])
    assert names == {"query", "key_value_down", "key_value_norm", "key_value_up", "output"}


def test_trap_A6_values_may_be_narrower_or_wider_than_keys(tiny_model, attend):
    for width in (2, 30):
        ours, _, wanted, _ = attend(tiny_model(value_head_dim=width), 7)
        np.testing.assert_allclose(ours, wanted, atol=2e-5 * wanted.std())


@pytest.mark.parametrize(
    "changes", [YARN, {"query_latent": None, "dense_layers": 0, "layers": 2}], ids=["yarn", "no_query_latent"]
)
def test_trap_A4_absorbed_decoding_equals_the_whole_row(tiny_model, run, changes):
    model = tiny_model(**changes, mtp_depth=0)
    weights, tokens, whole, (start, cache) = _prefilled(model, run)
    np.testing.assert_allclose(start, whole[:, :8], atol=1e-5 * whole.std())
    for sizes in ([1] * 8, [4, 4]):
        at, grown = 8, cache
        for size in sizes:
            positions = jnp.tile(jnp.arange(at, at + size), (2, 1))
            logits, grown = run(model, weights, _decode, tokens[:, at : at + size], grown, positions)
            np.testing.assert_allclose(logits, whole[:, at : at + size], atol=1e-5 * whole.std())
            at += size


def test_rows_of_a_batch_decode_at_their_own_positions(tiny_model, run):
    model = tiny_model(**YARN, mtp_depth=0)
    weights, tokens, whole, (_, cache) = _prefilled(model, run)
    chunk, positions = np.stack([tokens[0, 3:7], tokens[1, 8:12]]), np.array([[3, 4, 5, 6], [8, 9, 10, 11]])
    logits, grown = run(model, weights, _decode, chunk, cache, positions)
    np.testing.assert_allclose(logits, np.stack([whole[0, 3:7], whole[1, 8:12]]), atol=1e-5 * whole.std())
    grown, cache = np.concatenate(grown), np.concatenate(cache)
    np.testing.assert_allclose(grown[:, 0], cache[:, 0], atol=1e-4)
    np.testing.assert_array_equal(grown[:, 1, 12:], cache[:, 1, 12:])


def test_a_token_past_the_end_of_the_cache_is_not_written(tiny_model, run):
    model = tiny_model(**YARN, mtp_depth=0)
    weights = random_weights(model)
    cache = _cache_of(model, jnp.ones((2, 24, model.cache_width)))
    _, after = run(model, weights, _decode, np.zeros((2, 1), np.int32), cache, np.array([[1], [24]]))
    cache, after = jnp.concatenate(cache), jnp.concatenate(after)
    np.testing.assert_array_equal(after[:, 1], cache[:, 1])
    assert np.abs(np.asarray(after - cache)[:, 0, 1]).min(axis=-1).max() > 0


# On a CPU bfloat16 is held as its bits.
@pytest.mark.parametrize(("precision", "held"), [("float32", "float32"), ("bfloat16", "uint16")])
def test_the_cache_holds_nothing_but_latent_and_key(tiny_model, precision, held):
    model = tiny_model(precision=precision)
    cache = jax.eval_shape(lambda: Transformer(model, nnx.Rngs(0)).empty_cache(5, 70))
    width = model.key_value_latent + model.rope_head_dim
    assert [layers.shape for layers in cache] == [(1, 5, 70, width), (2, 5, 70, width)]
    assert {layers.dtype for layers in cache} == {jnp.dtype(held)}


def _prefilled(model: ModelConfig, run):
    """Weights, two rows of tokens, the logits of the whole rows, and logits and cache of their first 8 tokens.

    The cache is longer than the rows and full of numbers that must not be read.
    """
    weights = random_weights(model)
    tokens = np.random.default_rng(0).integers(0, model.vocabulary, (2, 16)).astype(np.int32)
    stale = _cache_of(model, jnp.full((2, 24, model.cache_width), 1e3))
    whole = np.asarray(run(model, weights, Transformer.__call__, tokens))
    return weights, tokens, whole, run(model, weights, _prefill, tokens[:, :8], stale)


def _cache_of(model: ModelConfig, layer_BTX: jax.Array) -> list[jax.Array]:
    return [jnp.stack([layer_BTX] * count) for count in (model.dense_layers, model.moe_layers) if count]


def _prefill(transformer: Transformer, tokens_BS, cache):
    hidden, cache, _ = transformer.prefill(tokens_BS, cache)
    return transformer.logits(transformer.norm(hidden)), cache


def _decode(transformer: Transformer, tokens_BS, cache, positions_BS):
    hidden, cache, _ = transformer.decode(tokens_BS, cache, positions_BS)
    return transformer.logits(transformer.norm(hidden)), cache
