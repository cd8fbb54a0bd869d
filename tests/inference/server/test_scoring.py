"""Log probabilities of a prompt: those of the plain model, whatever the length is padded to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.server import scoring
from dsv3_jax.inference.server.scoring import Scorer
from dsv3_jax.inference.weights import ready_to_decode

IDS = np.random.default_rng(0).integers(0, 250, 64).tolist()


@pytest.fixture(scope="module")
def scorer(model, tokenizer):
    return Scorer(ready_to_decode(model), tokenizer)


@pytest.fixture(scope="module")
def logprobs_SW(model, tokenizer):
    known = tokenizer.get_vocab_size()
    assert max(IDS) < known < model.model.vocabulary  # what lies beyond is padding
    return np.asarray(jax.nn.log_softmax(model(jnp.asarray([IDS]))[0, :, :known], axis=-1))


@pytest.mark.parametrize(("length", "top"), [(1, 1), (2, 1), (16, 1), (9, 0), (9, 3), (64, 1)])
def test_every_token_but_the_first_has_the_models_log_probability(scorer, logprobs_SW, length, top, monkeypatch):
    monkeypatch.setattr(scoring, "POSITIONS_AT_ONCE", 24)  # several pieces, and a length that they do not divide
    scored = scorer(IDS[:length], top)
    assert [token.token_id for token in scored] == IDS[1:length]
    for position, token in enumerate(scored):
        best = np.argsort(-logprobs_SW[position])[:top]
        assert [index for index, _ in token.top] == best.tolist()
        found = [token.logprob, *(value for _, value in token.top)]
        expected = logprobs_SW[position, [IDS[position + 1], *best]]
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
