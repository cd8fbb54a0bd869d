"""Choosing a token, against plain numpy and against the frequencies of many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.sampling import Sampling, SamplingError, SamplingInputs, choose_tokens, probabilities

WIDTH = 50
choose, probabilities = jax.jit(choose_tokens), jax.jit(probabilities)


def expected_probabilities(logits_W: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """One row: sort, cut after k, cut after the id that reaches p."""
    probability_W = np.exp((logits_W - logits_W.max()) / temperature)
    probability_W /= probability_W.sum()
    order = np.argsort(-probability_W, kind="stable")
    kept = order[:top_k] if top_k else order
    if top_p < 1:
        reached = np.cumsum(probability_W[kept] / probability_W[kept].sum())
        kept = kept[: np.searchsorted(reached, top_p) + 1]
    result_W = np.zeros_like(probability_W)
    result_W[kept] = probability_W[kept] / probability_W[kept].sum()
    return result_W


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 49, 50, 10_000])
@pytest.mark.parametrize("top_p", [0.001, 0.4, 0.95, 1.0])
def test_probabilities_are_those_of_sorting_and_cutting(temperature, top_k, top_p):
    logits_BW = np.random.default_rng(3).normal(size=(6, WIDTH)) * 3
    logits_BW[:, 40:] = -np.inf
    inputs = SamplingInputs.of(Sampling(temperature, top_k, top_p), 6)
    made_BW = np.asarray(probabilities(jnp.asarray(logits_BW, jnp.float32), inputs))
    expected_BW = np.stack([expected_probabilities(row, temperature, top_k, top_p) for row in logits_BW])
    np.testing.assert_array_equal(made_BW > 0, expected_BW > 0)
    np.testing.assert_allclose(made_BW, expected_BW, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 0.5, [2]),  # reached exactly
        (0, 0.51, [2, 0]),  # the id that crosses is kept
        (0, 0.75, [2, 0]),
        (0, 0.8, [2, 0, 1]),  # of equals the lowest id
        (0, 0.9, [2, 0, 1, 3]),
        (3, 1.0, [2, 0, 1]),
        (3, 0.58, [2, 0]),  # 0.5 of the 0.875 that top-k leaves is 0.571
        (3, 0.56, [2]),
    ],
)
def test_edges_and_ties_of_top_k_and_top_p(top_k, top_p, kept):
    probability_W = np.array([0.25, 0.125, 0.5, 0.125])
    inputs = SamplingInputs.of(Sampling(1.0, top_k, top_p), 1)
    made_W = probabilities(jnp.log(jnp.asarray(probability_W, jnp.float32))[None], inputs)[0]
    expected_W = np.zeros(4)
    expected_W[kept] = probability_W[kept] / probability_W[kept].sum()
    np.testing.assert_allclose(made_W, expected_W, rtol=1e-5)


def test_greedy_takes_the_largest_and_of_equals_the_first():
    logits_BW = np.random.default_rng(0).integers(-5, 6, size=(64, WIDTH)).astype(np.float32)
    inputs = SamplingInputs.of(Sampling(temperature=0.0, top_k=3, top_p=0.1), 64)
    np.testing.assert_array_equal(choose(logits_BW, inputs, jnp.arange(64)), logits_BW.argmax(axis=1))


def test_the_limits_of_sampling_are_greedy():
    logits_BW = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
    for sampling in (Sampling(temperature=1e-30), Sampling(temperature=5.0, top_k=1), Sampling(5.0, top_p=1e-6)):
        inputs = SamplingInputs.of(sampling, 64)
        np.testing.assert_array_equal(choose(logits_BW, inputs, jnp.arange(64)), logits_BW.argmax(axis=1))


@pytest.mark.parametrize("sampling", [Sampling(1.0, 0, 1.0), Sampling(0.7, 0, 0.9), Sampling(1.5, 5, 1.0)])
def test_draws_have_the_frequencies_of_the_probabilities(sampling):
    draws, width = 40_000, 12
    logits_W = np.random.default_rng(1).normal(size=width).astype(np.float32) * 1.5
    inputs = SamplingInputs.of(sampling, draws)
    drawn_B = np.asarray(choose(np.tile(logits_W, (draws, 1)), inputs, jnp.zeros(draws, jnp.int32)))
    settings = sampling.temperature, sampling.top_k, sampling.top_p
    expected_W = expected_probabilities(logits_W.astype(np.float64), *settings)
    counts_W = np.bincount(drawn_B, minlength=width)
    assert (counts_W[expected_W == 0] == 0).all()
    # 5 standard deviations of a binomial count
    deviation_W = 5 * np.sqrt(draws * expected_W * (1 - expected_W))
    assert (np.abs(counts_W - draws * expected_W) <= deviation_W).all()


def test_successive_positions_draw_independently():
    draws = 4_000
    inputs = SamplingInputs.of(Sampling(1.0, 0, 1.0, seed=5), 1)
    one = jax.jit(jax.vmap(lambda position: choose_tokens(jnp.zeros((1, 4)), inputs, position[None])[0]))
    drawn = np.asarray(one(jnp.arange(draws)))
    pairs = np.bincount(drawn[:-1] * 4 + drawn[1:], minlength=16)
    assert (np.abs(pairs - draws / 16) < 5 * np.sqrt(draws / 16)).all()


def test_a_row_draws_the_same_whatever_stands_beside_it():
    logits_BW = np.random.default_rng(2).normal(size=(5, WIDTH)).astype(np.float32)
    positions_B = jnp.array([3, 9, 3, 4, 100])
    whole_B = choose(logits_BW, SamplingInputs.of(Sampling(seed=11), 5), positions_B)
    fewer_B = choose(logits_BW[:2], SamplingInputs.of(Sampling(seed=11), 2), positions_B[:2])
    np.testing.assert_array_equal(whole_B[:2], fewer_B)
    changed_BW = np.concatenate([logits_BW[:4], -logits_BW[4:]])
    changed_B = choose(changed_BW, SamplingInputs.of(Sampling(seed=11), 5), positions_B)
    np.testing.assert_array_equal(changed_B[:4], whole_B[:4])


def test_rows_positions_and_seeds_have_streams_of_their_own():
    logits_BW = np.zeros((40, WIDTH), np.float32)

    def drawn(seed: int, position: int) -> np.ndarray:
        inputs = SamplingInputs.of(Sampling(1.0, 0, 1.0, seed), 40)
        return np.asarray(choose(logits_BW, inputs, jnp.full(40, position)))

    first = drawn(0, 0)
    np.testing.assert_array_equal(first, drawn(0, 0))
    assert len(set(first.tolist())) > 10
    assert (first != drawn(1, 0)).sum() > 30 and (first != drawn(0, 1)).sum() > 30


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(2.0, 0, 1.0), Sampling(2.0, 9, 0.99)])
def test_an_excluded_id_is_never_chosen(sampling):
    logits_BW = np.full((500, 2048), -np.inf, np.float32)
    logits_BW[:, ::50] = 0.0
    chosen_B = np.asarray(choose(logits_BW, SamplingInputs.of(sampling, 500), jnp.arange(500)))
    assert (chosen_B % 50 == 0).all() and (chosen_B < 2048).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_chooses_no_id(temperature):
    logits_BW = np.zeros((2, WIDTH), np.float32)
    logits_BW[0, 3] = np.nan
    first, second = choose(logits_BW, SamplingInputs.of(Sampling(temperature), 2), jnp.arange(2)).tolist()
    assert first == WIDTH and second < WIDTH


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be finite and at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be"),
        ({"seed": -1}, "seed=-1 must be between 0 and 4294967295"),
        ({"seed": 2**32}, "seed=4294967296 must be"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(SamplingError, match=message) as caught:
        Sampling(**settings)
    assert caught.value.exit_code == 2
