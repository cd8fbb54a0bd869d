"""Choosing a token, against plain numpy, transformers, and the frequencies of many draws."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dsv3_jax.inference.sampling import (
    CHOICE,
    Sampling,
    SamplingError,
    SamplingInputs,
    choose_tokens,
    draw,
    log_probabilities,
    probabilities,
    uniforms,
)

WIDTH = 50
choose, probabilities, draw = jax.jit(choose_tokens), jax.jit(probabilities), jax.jit(draw)
uniforms, log_probabilities = jax.jit(uniforms, static_argnums=2), jax.jit(log_probabilities, static_argnums=2)
# One of each kind, and neighbours that need other work than they do.
MIXED = (
    Sampling(0.0, seed=1),
    Sampling(1.0, 0, 1.0, seed=2),
    Sampling(0.7, 0, 0.9, seed=3),
    Sampling(1.5, 9, 1.0, seed=3),
    Sampling(0.0, 3, 0.5, min_p=0.2),
    Sampling(1.1, 20, 0.8, seed=5, min_p=0.05),
    Sampling(2.0, 0, 1.0, seed=6, min_p=0.1),
    Sampling(1.0, 2**40, 1.0, seed=2),
)


def same(sampling: Sampling, rows: int) -> SamplingInputs:
    """As for the prompts of one command line: every row has a stream of its own."""
    return SamplingInputs.of([sampling] * rows, range(rows))


def expected_probabilities(logits_W: np.ndarray, sampling: Sampling) -> np.ndarray:
    """One row: sort, cut after k, cut after the id that reaches p, cut what is below a share of the first."""
    if sampling.temperature == 0:
        return np.eye(len(logits_W))[logits_W.argmax()]
    probability_W = np.exp((logits_W - logits_W.max()) / sampling.temperature)
    probability_W /= probability_W.sum()
    order = np.argsort(-probability_W, kind="stable")
    kept = order[: sampling.top_k] if sampling.top_k else order
    if sampling.top_p < 1:
        reached = np.cumsum(probability_W[kept] / probability_W[kept].sum())
        kept = kept[: np.searchsorted(reached, sampling.top_p) + 1]
    kept = kept[probability_W[kept] >= sampling.min_p * probability_W[kept[0]]]
    result_W = np.zeros_like(probability_W)
    result_W[kept] = probability_W[kept] / probability_W[kept].sum()
    return result_W


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_probabilities_are_those_of_sorting_and_cutting(temperature):
    """Every mixture of the settings, a row each."""
    settings = itertools.product([0, 1, 7, 49, 50, 10_000], [0.001, 0.4, 0.95, 1.0], [0.0, 0.1, 1.0])
    samplings = [Sampling(temperature, top_k, top_p, min_p=min_p) for top_k, top_p, min_p in settings]
    logits_BW = np.random.default_rng(3).normal(size=(len(samplings), WIDTH)) * 3
    logits_BW[:, 40:] = -np.inf
    made_BW = probabilities(jnp.asarray(logits_BW, jnp.float32), SamplingInputs.of(samplings))
    for made_W, *row in zip(np.asarray(made_BW), logits_BW, samplings, strict=True):
        expected_W = expected_probabilities(*row)
        np.testing.assert_array_equal(made_W > 0, expected_W > 0, err_msg=str(row[1]))
        np.testing.assert_allclose(made_W, expected_W, rtol=1e-4, atol=1e-7, err_msg=str(row[1]))


def test_the_hottest_is_uniform():
    logits_BW = np.random.default_rng(0).normal(size=(6, WIDTH)).astype(np.float32)
    logits_BW[:, 10:] = -np.inf
    expected_W = np.repeat([0.1, 0.0], [10, WIDTH - 10])
    for temperature in (1e20, 1e300):
        made_BW = probabilities(logits_BW, same(Sampling(temperature, 0, 1.0), 6))
        np.testing.assert_allclose(made_BW, np.tile(expected_W, (6, 1)), rtol=1e-6)


@pytest.mark.parametrize("sampling", MIXED)
def test_probabilities_are_those_of_transformers(sampling):
    if sampling.temperature == 0:
        sampling = dataclasses.replace(sampling, temperature=0.4)
    logits_BW = np.random.default_rng(4).normal(size=(6, WIDTH)).astype(np.float32) * 3
    made_BW = np.asarray(probabilities(logits_BW, same(sampling, 6)))
    scores_BW = TemperatureLogitsWarper(sampling.temperature)(None, torch.tensor(logits_BW))
    if sampling.top_k:
        scores_BW = TopKLogitsWarper(sampling.top_k)(None, scores_BW)
    if sampling.top_p < 1:
        scores_BW = TopPLogitsWarper(sampling.top_p)(None, scores_BW)
    if sampling.min_p:
        scores_BW = MinPLogitsWarper(sampling.min_p)(None, scores_BW)
    expected_BW = torch.softmax(scores_BW, dim=-1).numpy()
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
    inputs = same(Sampling(1.0, top_k, top_p), 1)
    made_W = probabilities(jnp.log(jnp.asarray(probability_W, jnp.float32))[None], inputs)[0]
    expected_W = np.zeros(4)
    expected_W[kept] = probability_W[kept] / probability_W[kept].sum()
    np.testing.assert_allclose(made_W, expected_W, rtol=1e-5)


def test_greedy_takes_the_largest_and_of_equals_the_first():
    logits_BW = np.random.default_rng(0).integers(-5, 6, size=(64, WIDTH)).astype(np.float32)
    inputs = same(Sampling(temperature=0.0, top_k=3, top_p=0.1), 64)
    np.testing.assert_array_equal(choose(logits_BW, inputs, jnp.arange(64)), logits_BW.argmax(axis=1))
    expected_BW = np.eye(WIDTH, dtype=np.float32)[logits_BW.argmax(axis=1)]
    np.testing.assert_array_equal(probabilities(logits_BW, inputs), expected_BW)


def test_the_limits_of_sampling_are_greedy():
    logits_BW = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
    cold = Sampling(temperature=1e-42)
    for sampling in (
        Sampling(temperature=1e-30),
        Sampling(temperature=5.0, top_k=1),
        Sampling(5.0, top_p=1e-6),
        Sampling(5.0, top_p=1e-50),
        cold,
        Sampling(5.0, 0, 1.0, min_p=1),
    ):
        inputs = same(sampling, 64)
        np.testing.assert_array_equal(choose(logits_BW, inputs, jnp.arange(64)), logits_BW.argmax(axis=1))


@pytest.mark.parametrize("sampling", [Sampling(1.0, 0, 1.0), Sampling(1.5, 9, 0.9, min_p=0.05)])
def test_draws_have_the_frequencies_of_the_probabilities(sampling):
    draws, width = 40_000, 12
    logits_W = np.random.default_rng(1).normal(size=width).astype(np.float32) * 1.5
    inputs = same(sampling, draws)
    drawn_B = np.asarray(choose(np.tile(logits_W, (draws, 1)), inputs, jnp.zeros(draws, jnp.int32)))
    expected_W = draws * expected_probabilities(logits_W.astype(np.float64), sampling)
    counts_W = np.bincount(drawn_B, minlength=width)
    possible_W = expected_W > 0
    assert (counts_W[~possible_W] == 0).all()
    assert chi_square_is_usual(counts_W[possible_W], expected_W[possible_W])


def test_a_residual_is_drawn_by_its_weights():
    """As speculative sampling does: weights that do not sum to 1, and uniform numbers of a purpose of its own."""
    draws, weight_W = 40_000, np.array([0.0, 0.02, 0.0, 0.3, 0.1], np.float32)
    uniform_B = uniforms(same(Sampling(seed=8), draws), jnp.zeros(draws, jnp.int32), 2)
    counts_W = np.bincount(draw(np.tile(weight_W, (draws, 1)), uniform_B), minlength=6)
    assert counts_W[[0, 2, 5]].sum() == 0
    assert chi_square_is_usual(counts_W[[1, 3, 4]], draws * weight_W[[1, 3, 4]] / weight_W.sum())


def chi_square_is_usual(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Its mean is the degrees of freedom f and its variance 2f: within 4.5 standard deviations above."""
    freedom = len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum()) < freedom + 4.5 * np.sqrt(2 * freedom)


def test_successive_positions_draw_independently():
    draws = 4_000
    inputs = same(Sampling(1.0, 0, 1.0, seed=5), 1)
    one = jax.jit(jax.vmap(lambda position: choose_tokens(jnp.zeros((1, 4)), inputs, position[None])[0]))
    drawn = np.asarray(one(jnp.arange(draws)))
    pairs = np.bincount(drawn[:-1] * 4 + drawn[1:], minlength=16)
    assert (np.abs(pairs - draws / 16) < 5 * np.sqrt(draws / 16)).all()


@pytest.mark.parametrize("width", [1, 4099])
def test_a_row_is_itself_alone_bit_for_bit_whatever_stands_beside_it(width):
    random, rows = np.random.default_rng(2), len(MIXED)
    logits_BW = random.normal(size=(rows, width)).astype(np.float32) * 3
    logits_BW[:, width // 2 + 1 :: 7] = -np.inf
    positions_B, indices_B = random.integers(0, 1000, rows), random.integers(0, 5, rows)

    def made(order: list[int]) -> tuple[np.ndarray, np.ndarray]:
        inputs = SamplingInputs.of([MIXED[row] for row in order], indices_B[order].tolist())
        chosen_B = choose(logits_BW[order], inputs, positions_B[order])
        return np.asarray(probabilities(logits_BW[order], inputs)), np.asarray(chosen_B)

    # Alone: nothing runs for a neighbour that the row does not need.
    alone = [tuple(made_B[0] for made_B in made([row] * rows)) for row in range(rows)]
    for order in (list(range(rows)), random.permutation(rows).tolist(), random.choice(rows, rows).tolist()):
        for row, probability_W, token in zip(order, *made(order), strict=True):
            np.testing.assert_array_equal(probability_W.view(np.int32), alone[row][0].view(np.int32))
            assert token == alone[row][1]
    for row, (probability_W, token) in enumerate(alone):
        expected_W = expected_probabilities(logits_BW[row].astype(np.float64), MIXED[row])
        np.testing.assert_allclose(probability_W, expected_W, rtol=1e-4, atol=1e-7)
        # In a batch of another size sums may round otherwise, and the token is the same.
        assert made([row])[1] == [token]


def test_rows_positions_and_seeds_have_streams_of_their_own():
    logits_BW = np.zeros((64, WIDTH), np.float32)

    def drawn(seed: int, position: int) -> np.ndarray:
        inputs = same(Sampling(1.0, 0, 1.0, seed), 64)
        return np.asarray(choose(logits_BW, inputs, jnp.full(64, position)))

    first = drawn(0, 0)
    np.testing.assert_array_equal(first, drawn(0, 0))
    assert len(set(first.tolist())) > 20
    assert (first != drawn(1, 0)).sum() > 50 and (first != drawn(0, 1)).sum() > 50
    # A stream is that of the seed and the index, not of the place in the batch; the index is 0 unless given.
    inputs = SamplingInputs.of([Sampling(1.0, 0, 1.0)] * 64, range(63, -1, -1))
    np.testing.assert_array_equal(choose(logits_BW, inputs, jnp.zeros(64, jnp.int32)), first[::-1])
    inputs = SamplingInputs.of([Sampling(1.0, 0, 1.0)] * 64)
    np.testing.assert_array_equal(choose(logits_BW, inputs, jnp.zeros(64, jnp.int32)), np.full(64, first[0]))


def test_a_seed_goes_on_giving_the_same_draws():
    """Written down once: a change here breaks what people have reproduced."""
    inputs = same(Sampling(1.0, 0, 1.0, seed=7), 6)
    expected = [9, 47, 22, 29, 19, 18]
    assert choose(np.zeros((6, WIDTH), np.float32), inputs, 3 * jnp.arange(6)).tolist() == expected


def test_uniform_numbers_of_purposes_are_independent():
    draws = 20_000
    inputs, positions_B = same(Sampling(seed=1), draws), jnp.full(draws, 7)
    numbers = [np.asarray(uniforms(inputs, positions_B, purpose)) for purpose in (CHOICE, 1, 2)]
    numbers.append(np.asarray(uniforms(inputs, positions_B + 1, 1)))
    for number_B in numbers:
        assert number_B.dtype == np.float32 and number_B.min() >= 0 and number_B.max() < 1
        assert chi_square_is_usual(np.histogram(number_B, 50, (0, 1))[0], np.full(50, draws / 50))
    correlation = np.corrcoef(numbers) - np.eye(len(numbers))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(draws)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(2.0, 0, 1.0), Sampling(2.0, 9, 0.99)])
def test_an_excluded_id_is_never_chosen(sampling):
    logits_BW = np.full((500, 2048), -np.inf, np.float32)
    logits_BW[:, ::50] = 0.0
    chosen_B = np.asarray(choose(logits_BW, same(sampling, 500), jnp.arange(500)))
    assert (chosen_B % 50 == 0).all() and (chosen_B < 2048).all()


@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0)])
def test_nan_and_no_possible_id_choose_no_id(temperatures):
    logits_BW = np.zeros((6, WIDTH), np.float32)
    logits_BW[0, 3], logits_BW[2] = np.nan, -np.inf
    for settings in ({}, {"top_k": 4, "min_p": 0.5}):
        inputs = SamplingInputs.of([Sampling(temperature, **settings) for temperature in 2 * temperatures])
        first, second, third = choose(logits_BW, inputs, jnp.arange(6))[:3].tolist()
        assert first == third == WIDTH and second < WIDTH
        assert not (np.asarray(probabilities(logits_BW, inputs))[[0, 2]] > 0).any()


@pytest.mark.parametrize("top", [0, 1, 5, 2 * WIDTH])
def test_log_probabilities_are_those_of_the_raw_logits(top):
    logits_BW = np.random.default_rng(6).integers(-8, 9, size=(7, WIDTH)).astype(np.float32) * 3
    logits_BW[:, ::6] = -np.inf
    tokens_B = np.arange(7) * 7 + 1
    exact_BW = logits_BW - np.log(np.exp(logits_BW.astype(np.float64)).sum(axis=1, keepdims=True))
    order_BK = np.argsort(-exact_BW, axis=1, kind="stable")[:, :top]
    chosen_B, ids_BK, top_BK = log_probabilities(logits_BW, tokens_B, top)
    np.testing.assert_array_equal(ids_BK, order_BK)
    np.testing.assert_allclose(chosen_B, exact_BW[np.arange(7), tokens_B], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(top_BK, np.take_along_axis(exact_BW, order_BK, axis=1), rtol=1e-5, atol=1e-6)
    assert (chosen_B.dtype, ids_BK.dtype, top_BK.dtype) == (np.float32, np.int32, np.float32)


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
        ({"min_p": -0.1}, "min_p=-0.1 must be between 0 and 1"),
        ({"min_p": float("nan")}, "min_p=nan must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be finite and above 0; 1 turns it off"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf must be"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1 must be between -2 and 2; 0 turns it off"),
        ({"frequency_penalty": -3.0}, "frequency_penalty=-3.0 must be between -2 and 2"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(SamplingError, match=message) as caught:
        Sampling(**settings)
    assert caught.value.exit_code == 2
