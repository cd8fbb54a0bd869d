"""Penalties for repeating, against loops over one row's tokens and against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from dsv3_jax.inference.penalties import History, penalized
from dsv3_jax.inference.sampling import Sampling, SamplingInputs

WIDTH = 40
PROMPTS = [[1, 2, 2, 39], [5], [7, 8, 9], [0, 1]]
OUTPUTS = [[2, 3, 3, 3], [4, 4, 6, 0], [7, 30, 30, 2], [1, 1, 1, 1]]
SAMPLINGS = [
    Sampling(repetition_penalty=1.3),
    Sampling(presence_penalty=0.5, frequency_penalty=-0.75),
    Sampling(),
    Sampling(repetition_penalty=0.8, presence_penalty=-2.0, frequency_penalty=2.0),
]
penalize = jax.jit(penalized)


def histories(prompts, outputs) -> History:
    history, add = History.of(prompts, WIDTH), jax.jit(History.with_tokens)
    for tokens in zip(*outputs, strict=True):
        history = add(history, jnp.array(tokens), jnp.ones(len(tokens), bool))
    return history


def logits_of(rows: int) -> np.ndarray:
    logits_BW = np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32) * 4
    logits_BW[:, [2, 20]] = -np.inf
    logits_BW[:, 1] = 0.0
    return logits_BW


def expected(logits_W: np.ndarray, sampling: Sampling, prompt: list[int], output: list[int]) -> np.ndarray:
    result_W = logits_W.astype(np.float64)
    for token in {*prompt, *output}:
        penalty = sampling.repetition_penalty
        result_W[token] = result_W[token] / penalty if result_W[token] > 0 else result_W[token] * penalty
    for token in output:
        result_W[token] -= sampling.frequency_penalty
    for token in set(output):
        result_W[token] -= sampling.presence_penalty
    return result_W


def test_each_row_has_its_own_penalties_and_history():
    logits_BW, inputs = logits_of(4), SamplingInputs.of(SAMPLINGS)
    made_BW = np.asarray(penalize(logits_BW, inputs, histories(PROMPTS, OUTPUTS)))
    expected_BW = np.stack([expected(*row) for row in zip(logits_BW, SAMPLINGS, PROMPTS, OUTPUTS, strict=True)])
    np.testing.assert_allclose(made_BW, expected_BW, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(made_BW[2], logits_BW[2])
    for row in range(4):
        alone = SamplingInputs.of(SAMPLINGS[row : row + 1])
        history = histories(PROMPTS[row : row + 1], OUTPUTS[row : row + 1])
        np.testing.assert_array_equal(penalize(logits_BW[row : row + 1], alone, history)[0], made_BW[row])


@pytest.mark.parametrize("penalty", [0.7, 1.2, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    logits_BW = logits_of(4)
    inputs = SamplingInputs.of([Sampling(repetition_penalty=penalty)] * 4)
    made_BW = penalize(logits_BW, inputs, histories(PROMPTS, OUTPUTS))
    for row, (prompt, output) in enumerate(zip(PROMPTS, OUTPUTS, strict=True)):
        ids, scores = torch.tensor([prompt + output]), torch.tensor(logits_BW[row : row + 1])
        expected_W = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)[0]
        np.testing.assert_allclose(made_BW[row], expected_W, rtol=1e-6)


def test_an_extreme_repetition_penalty_leaves_logits_finite():
    logits_BW = logits_of(2)
    inputs = SamplingInputs.of([Sampling(repetition_penalty=penalty) for penalty in (1e-44, 1e38)])
    made_BW = penalize(logits_BW, inputs, histories(PROMPTS[:2], OUTPUTS[:2]))
    np.testing.assert_array_equal(np.isfinite(made_BW), np.isfinite(logits_BW))


def test_without_penalties_the_logits_are_the_same_and_without_a_history_nothing_is_computed():
    logits_BW, inputs = logits_of(4), SamplingInputs.of([Sampling()] * 4)
    np.testing.assert_array_equal(penalize(logits_BW, inputs, histories(PROMPTS, OUTPUTS)), logits_BW)
    assert penalized(logits_BW, inputs, None) is logits_BW


def test_a_history_counts_the_tokens_it_is_told_to():
    history = History.of([[3, 3], []], WIDTH)
    assert np.flatnonzero(history.prompt_BW[0]).tolist() == [3] and not history.prompt_BW[1].any()
    for counted_B in ([True, False], [True, True]):
        history = history.with_tokens(jnp.array([5, WIDTH]), jnp.array(counted_B))
    expected_BW = np.zeros((2, WIDTH), np.int32)
    expected_BW[0, 5] = 2
    np.testing.assert_array_equal(history.generated_BW, expected_BW)
    assert history.generated_BW.dtype == np.int32 and history.prompt_BW.dtype == bool
