"""Targets, denominators and the objective, on rows small enough to check by eye."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import config as tiny
from dsv3_jax.model.functional import abstract_trees, put_together, skeleton_of
from dsv3_jax.training.losses import (
    Batch,
    LossCounts,
    Losses,
    LossWeights,
    loss_counts,
    loss_sums,
    mean_losses,
    objective,
    targets,
)


def _batch(segments: list[list[int]]) -> Batch:
    """Tokens 100, 101, ... in the first row, 200, 201, ... in the second."""
    segment_ids = jnp.array(segments, jnp.int32)
    rows, length = segment_ids.shape
    tokens = 100 * jnp.arange(1, rows + 1)[:, None] + jnp.arange(length)
    return Batch(tokens.astype(jnp.int32), segment_ids, jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)))


def test_depth_k_predicts_one_token_further_than_the_depth_before():
    ahead = targets(_batch([[1] * 6]), mtp_depth=2)
    np.testing.assert_array_equal(ahead.following[0, :, 0], [101, 102, 103, 104, 105])
    np.testing.assert_array_equal(ahead.following[0, :4, 1], [102, 103, 104, 105])
    np.testing.assert_array_equal(ahead.following[0, :3, 2], [103, 104, 105])
    np.testing.assert_array_equal(ahead.counted[0].T, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])


def test_nothing_is_predicted_across_documents_or_into_padding():
    counted = targets(_batch([[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 0, 0, 0, 0, 0, 0]]), mtp_depth=2).counted
    np.testing.assert_array_equal(counted[0].T, [[1, 1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1, 0], [0] * 7])
    np.testing.assert_array_equal(counted[1].T, [[1, 0, 0, 0, 0, 0, 0], [0] * 7, [0] * 7])


def test_the_mask_of_what_is_learnt_moves_with_the_token_that_is_predicted():
    segments = [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [1] * 10]
    learnt = np.array([[0, 0, 1, 1, 0, 0, 0, 1, 1, 1], [0] * 5 + [1] * 5])
    batch = _batch(segments)._replace(learnt=jnp.asarray(learnt, jnp.int32))
    counted = targets(batch, mtp_depth=2).counted
    for row, place, depth in np.ndindex(2, 9, 3):
        target = place + depth + 1
        own = target < 10 and segments[row][place] == segments[row][target] != 0
        assert bool(counted[row, place, depth]) == bool(own and learnt[row, target]), (row, place, depth)
    np.testing.assert_array_equal(loss_counts(batch, mtp_depth=2).tokens, counted.sum(axis=(0, 1)))


def test_a_module_deeper_than_the_row_counts_nothing():
    counted = targets(_batch([[1, 1, 1]]), mtp_depth=4).counted
    np.testing.assert_array_equal(counted[0].T, [[1, 1], [1, 0], [0, 0], [0, 0], [0, 0]])


def test_each_depth_has_its_own_denominator_and_rows_of_padding_none():
    counts = loss_counts(_batch([[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8]), mtp_depth=2)
    np.testing.assert_array_equal(counts.tokens, [5 + 1, 2, 0])
    assert int(counts.rows) == 2


def test_means_divide_by_counts_and_survive_having_none():
    model = dataclasses.replace(tiny.model, layers=3, dense_layers=1, mtp_depth=2)
    sums = Losses(jnp.float32(12), jnp.array([6.0, 0.0]), jnp.float32(24))
    means = mean_losses(sums, LossCounts(jnp.array([6, 2, 0]), jnp.int32(3)), model)
    assert float(means.next_token) == 2
    np.testing.assert_array_equal(means.mtp, [3, 0])
    assert float(means.balance) == 24 / (3 * 4)
    nothing = mean_losses(
        Losses(jnp.float32(0), jnp.zeros(2), jnp.float32(0)), LossCounts(jnp.zeros(3), jnp.int32(0)), model
    )
    assert float(nothing.next_token) == 0 and not np.any(nothing.mtp) and float(nothing.balance) == 0


def test_the_objective_averages_modules_and_sums_routers():
    model = dataclasses.replace(tiny.model, layers=3, dense_layers=1, mtp_depth=2)
    means = Losses(jnp.float32(2), jnp.array([3.0, 5.0]), jnp.float32(1.25))
    weights = LossWeights(jnp.float32(0.3), jnp.float32(0.01))
    assert float(objective(means, weights, model)) == pytest.approx(2 + 0.3 * (3 + 5) / 2 + 0.01 * 4 * 1.25)
    without = dataclasses.replace(model, mtp_depth=0, layers=1)
    assert float(objective(means._replace(mtp=jnp.zeros(0)), weights, without)) == 2


# The sums of a whole model, against its own logits in float64.


CONFIG = dataclasses.replace(
    tiny,
    model=dataclasses.replace(
        tiny.model, vocabulary=50, width=16, layers=2, dense_ffn_width=16, heads=2, query_latent=8, key_value_latent=8,
        nope_head_dim=4, rope_head_dim=4, value_head_dim=4, experts=4, experts_per_token=2, expert_ffn_width=8,
        expert_groups=2, mtp_depth=2,
    ),
)  # fmt: skip


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


DOCUMENTS = np.array([[1] * 5 + [2] * 8, [1] * 4 + [0] * 9, [0] * 13], np.int32)


@pytest.fixture(scope="module")
def measure() -> Callable[[np.ndarray], tuple[Losses, list[jax.Array], list[jax.Array]]]:
    """From tokens to the sums, the loads, and the logits of every depth."""
    skeleton, random = skeleton_of(CONFIG.model), np.random.default_rng(3)
    trees = jax.tree.map(lambda leaf: 0.3 * random.normal(size=leaf.shape), abstract_trees(skeleton))
    trees = jax.tree.map(lambda leaf: leaf.astype(np.float32), trees)
    positions = np.tile(np.arange(13, dtype=np.int32), (3, 1))

    @jax.jit
    def run(trees, tokens, learnt=None):
        batch, model = Batch(tokens, DOCUMENTS, positions, learnt), put_together(skeleton, *trees)
        sums, loads = loss_sums(model, batch, isolate_documents=True)
        where = positions[:, :-1], DOCUMENTS[:, :-1]
        hidden, _ = model.hidden_states(tokens[:, :-1], *where)
        states, _ = model.mtp_states(hidden, targets(batch, 2).following[..., :-1], *where)
        return sums, loads, [model.logits(model.norm(hidden)), *(model.logits(state) for state in states)]

    return partial(run, trees)


def _tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, DOCUMENTS.shape).astype(np.int32)


def test_sums_are_those_of_the_logits_over_the_tokens_of_each_document(measure):
    tokens = _tokens()
    sums, _, logits = measure(tokens)
    for depth, logits_BSW in enumerate(logits):
        nats, counted = 0.0, 0
        log_softmax = _log_softmax(logits_BSW)
        for row in range(3):
            for place in range(12 - depth):
                target = place + depth + 1
                if DOCUMENTS[row, place] == DOCUMENTS[row, target] != 0:
                    nats -= log_softmax[row, place, tokens[row, target]]
                    counted += 1
        assert counted == (4 + 7 + 3, 3 + 6 + 2, 2 + 5 + 1)[depth]
        found = sums.next_token if depth == 0 else sums.mtp[depth - 1]
        np.testing.assert_allclose(found, nats, rtol=1e-5)


def test_loads_count_the_tokens_each_router_saw(measure):
    _, loads, _ = measure(_tokens())
    assert [load.shape for load in loads] == [(1, 4), (4,), (4,)]
    # Present tokens; those with a token to embed and one to predict; one further. Each goes to two experts.
    assert [int(load.sum()) for load in loads] == [2 * (12 + 4), 2 * (3 + 6 + 2), 2 * (2 + 5 + 1)]


def test_what_is_not_learnt_is_read_and_adds_nothing(measure):
    tokens = _tokens()
    learnt = np.random.default_rng(5).integers(0, 2, DOCUMENTS.shape).astype(np.int32)
    sums, _, logits = measure(tokens, learnt)
    for depth, logits_BSW in enumerate(logits):
        log_softmax = _log_softmax(logits_BSW)
        nats = sum(
            -log_softmax[row, place, tokens[row, place + depth + 1]]
            for row in range(3)
            for place in range(12 - depth)
            if DOCUMENTS[row, place] == DOCUMENTS[row, place + depth + 1] != 0 and learnt[row, place + depth + 1]
        )
        found = sums.next_token if depth == 0 else sums.mtp[depth - 1]
        np.testing.assert_allclose(found, nats, rtol=1e-5)


def test_what_padding_holds_changes_no_loss_and_no_load(measure):
    sums, loads, _ = measure(_tokens())
    other_sums, other_loads, _ = measure(np.where(DOCUMENTS > 0, _tokens(), 49))
    np.testing.assert_allclose(other_sums.next_token, sums.next_token, rtol=1e-6)
    np.testing.assert_allclose(other_sums.mtp, sums.mtp, rtol=1e-6)
    np.testing.assert_allclose(other_sums.balance, sums.balance, rtol=1e-6)
    for load, other_load in zip(loads, other_loads, strict=True):
        np.testing.assert_array_equal(load, other_load)
