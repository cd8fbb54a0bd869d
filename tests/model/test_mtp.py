"""Multi-token prediction against the equations written out, one position at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.functional import abstract_trees, skeleton_of
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.training.losses import Batch, loss_sums
from tests.reference import transformer as reference
from tests.reference.weights import Tree, random_weights


def _states(transformer: Transformer, tokens_BS, following_BSk):
    hidden_BSD, _ = transformer.hidden_states(tokens_BS)
    return transformer.mtp_states(hidden_BSD, following_BSk)[0]


@pytest.fixture
def states(run):
    """`states(model, weights, tokens)`: every module's states at the positions that have a token to embed."""

    def compute(model: ModelConfig, weights: tuple[Tree, Tree], tokens: np.ndarray) -> list[np.ndarray]:
        rows = np.concatenate([tokens, np.zeros(model.mtp_depth, tokens.dtype)])
        following = np.stack([rows[depth : depth + len(tokens)] for depth in range(1, model.mtp_depth + 1)], axis=-1)
        found = run(model, weights, _states, tokens[None], following[None])
        return [np.asarray(state[0])[: len(tokens) - depth] for depth, state in enumerate(found, start=1)]

    return compute


def _tokens(model: ModelConfig, length: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, model.vocabulary, length).astype(np.int32)


def _reference(model: ModelConfig, weights: tuple[Tree, Tree], tokens: np.ndarray) -> list[np.ndarray]:
    row = reference.plain_row(tokens)
    hidden, _ = reference.hidden_states(row, *weights, model)
    return reference.mtp_states(hidden, row, *weights, model)[0]


@pytest.mark.parametrize(("depth", "source"), [(2, "final_norm"), (1, "residual")])
def test_trap_T2_each_module_reads_the_configured_state(tiny_model, states, depth, source):
    model = tiny_model(layers=2, mtp_depth=depth, mtp_input=source)
    weights, tokens = random_weights(model), _tokens(model, 9)
    found, wanted = states(model, weights, tokens), _reference(model, weights, tokens)
    assert len(found) == depth
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * theirs.std())


def test_trap_T1_the_projection_reads_the_embedding_first(tiny_model, states):
    model = tiny_model(layers=2, mtp_depth=1)
    parameters, router_bias = random_weights(model)
    projection = parameters["mtp"][0]["projection"]
    tokens = _tokens(model, 9)
    changed = tokens.copy()
    changed[1] = (tokens[1] + 1) % model.vocabulary
    projection[: model.width] = 0.0
    # Without its embedding half the module at position 0 cannot tell which token follows.
    without, also_without = (states(model, (parameters, router_bias), row)[0][0] for row in (tokens, changed))
    np.testing.assert_array_equal(without, also_without)
    projection[: model.width] = projection[model.width :]
    projection[model.width :] = 0.0
    # Without its hidden half it sees nothing else of the row: position 0 holds whatever token.
    changed = tokens.copy()
    changed[0] = (tokens[0] + 1) % model.vocabulary
    without, also_without = (states(model, (parameters, router_bias), row)[0][0] for row in (tokens, changed))
    np.testing.assert_array_equal(without, also_without)


def test_trap_T3_the_head_reads_the_modules_own_norm(tiny_model, states):
    model = tiny_model(layers=2, mtp_depth=1, mtp_input="residual")
    parameters, router_bias = random_weights(model)
    tokens = _tokens(model, 9)
    before = states(model, (parameters, router_bias), tokens)[0]
    parameters["norm"]["gain"] *= 3.0
    np.testing.assert_array_equal(states(model, (parameters, router_bias), tokens)[0], before)
    parameters["mtp"][0]["norm"]["gain"] *= 3.0
    np.testing.assert_allclose(states(model, (parameters, router_bias), tokens)[0], 3.0 * before, rtol=1e-5)


def test_trap_T4_positions_stay_while_tokens_shift(tiny_model, run):
    """A document in the middle of a row, its positions restarting, is predicted as it is alone."""
    model = tiny_model(layers=2, mtp_depth=1)
    weights = random_weights(model)
    tokens = _tokens(model, 13)
    positions, segments = np.r_[0:5, 0:8].astype(np.int32), np.repeat(np.int32([1, 2]), [5, 8])

    def at(transformer: Transformer, tokens, following, positions, segments):
        hidden, _ = transformer.hidden_states(tokens, positions, segments)
        return transformer.mtp_states(hidden, following, positions, segments)[0][0][0]

    row = [part[None] for part in (tokens[:12], tokens[1:, None], positions[:12], segments[:12])]
    together = np.asarray(run(model, weights, at, *row))
    apart = _reference(model, weights, tokens[5:])[0]
    np.testing.assert_allclose(together[5:], apart[:7], atol=2e-5 * apart.std())


def test_trap_T5_labels_are_shifted_twice_and_cross_no_document(tiny_model, run):
    model = tiny_model(layers=2, mtp_depth=1)
    weights = random_weights(model)
    documents = [_tokens(model, 6), _tokens(model, 9)[::-1], _tokens(model, 2)]
    tokens = np.concatenate(documents)[None]
    positions = np.concatenate([np.arange(len(document)) for document in documents])[None]
    segments = np.repeat(np.arange(1, 4), [len(document) for document in documents])[None]
    batch = Batch(*(jnp.asarray(part, jnp.int32) for part in (tokens, segments, positions)))
    found = run(model, weights, lambda transformer: loss_sums(transformer, batch, isolate_documents=True)[0])
    wanted = [0.0, 0.0]
    for document in documents:
        row = reference.plain_row(document)
        hidden, _ = reference.hidden_states(row, *weights, model)
        normed = np.stack([reference.rms_norm(x_D, weights[0]["norm"]["gain"], model.norm_epsilon) for x_D in hidden])
        for depth, state in enumerate([normed, reference.mtp_states(hidden, row, *weights, model)[0][0]]):
            for at in range(len(document) - depth - 1):
                wanted[depth] += reference.surprise(state[at] @ weights[0]["head"], document[at + depth + 1])
    np.testing.assert_allclose([found.next_token, found.mtp[0]], wanted, rtol=1e-5)


def test_trap_T10_a_module_holds_no_projection_bias_and_no_copy_of_embedding_or_head(tiny_model):
    parameters, _ = abstract_trees(skeleton_of(tiny_model(mtp_depth=1)))
    assert set(parameters["mtp"][0]) == {"embedding_norm", "hidden_norm", "projection", "block", "norm"}
    assert parameters["mtp"][0]["projection"].shape == (72, 36)
