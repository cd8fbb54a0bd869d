"""Logits, MTP states and gradients against transformers: the same architecture, written by other people."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.training.losses import Batch, loss_sums
from tests.reference.transformers_weights import transformers_model, transformers_mtp_states, transformers_weights
from tests.reference.weights import Tree, random_weights

# Largest error of a float32 logit, as a share of the logits' standard deviation.
TOLERANCE = 2e-5

EXPERTS_ALONE: dict[str, Any] = {"layers": 2, "dense_layers": 0}
YARN: dict[str, Any] = {"yarn_factor": 40.0, "rope_head_dim": 16}
V2: dict[str, Any] = {
    "score_function": "softmax",
    "group_score": "max",
    "selection_bias": False,
    "normalize_weights": False,
    "routed_scale": 4.0,
    "shared_experts": 2,
    "mtp_depth": 0,
}
V2_LITE: dict[str, Any] = {
    **V2,
    **YARN,
    **EXPERTS_ALONE,
    "routed_scale": 1.0,
    "query_latent": None,
    "expert_groups": 1,
    "groups_per_token": 1,
    "yarn_mscale": 0.707,
    "yarn_mscale_all_dim": 0.707,
}


@pytest.fixture(autouse=True, scope="module")
def two_torch_threads():
    torch.set_num_threads(2)


@pytest.fixture
def relative_error(run):
    """Largest error of our logits over theirs, from position 0 and across the original length of 4096."""

    def compare(model: ModelConfig, weights: tuple[Tree, Tree]) -> float:
        theirs = transformers_model(model, *weights)
        tokens = _tokens(model, 4, 24)
        positions = np.arange(24) + np.array([0, 5, 4090, 5000])[:, None]
        ours = run(model, weights, Transformer.__call__, tokens, jnp.asarray(positions))
        with torch.no_grad():
            wanted = torch.cat(
                [
                    theirs(torch.tensor(row)[None], position_ids=torch.tensor(at)[None]).logits
                    for row, at in zip(tokens, positions, strict=True)
                ]
            ).numpy()
        return float(np.abs(np.asarray(ours) - wanted).max() / wanted.std())

    return compare


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**EXPERTS_ALONE, "experts_per_token": 1},
        {**EXPERTS_ALONE, "query_latent": None, "expert_groups": 1, "groups_per_token": 1},
        {"groups_per_token": 4, "experts_per_token": 8, "normalize_weights": False, "shared_experts": 2},
        {**EXPERTS_ALONE, **YARN, "yarn_mscale": 0.707, "yarn_mscale_all_dim": 1.3},
        V2,
        V2_LITE,
    ],
    ids=["v3", "one_expert", "no_query_latent_one_group", "every_expert", "yarn_unequal_mscales", "v2", "v2_lite"],
)
def test_logits_are_those_of_transformers(tiny_model, relative_error, changes):
    model = tiny_model(**changes)
    assert relative_error(model, random_weights(model)) < TOLERANCE


def test_trap_R3_all_negative_biases_route_as_in_transformers(tiny_model, relative_error):
    model = tiny_model()
    assert relative_error(model, random_weights(model, bias=(-3.0, 0.3))) < TOLERANCE


def test_trap_Y1_yarn_scales_the_softmax_at_every_position(tiny_model, relative_error):
    model = tiny_model(**EXPERTS_ALONE, **YARN)
    assert relative_error(model, random_weights(model)) < TOLERANCE


def test_trap_A1_latent_norms_keep_their_own_epsilon(tiny_model, relative_error):
    # transformers builds the latent norms with 1e-6 whatever the configuration says of the other norms.
    model = tiny_model(**EXPERTS_ALONE, norm_epsilon=0.05, latent_norm_epsilon=1e-6)
    assert relative_error(model, random_weights(model)) < TOLERANCE


def test_trap_T1_mtp_states_are_those_of_transformers(tiny_model, run):
    model = tiny_model(**EXPERTS_ALONE, mtp_depth=2)
    parameters, router_bias = weights = random_weights(model)
    tokens = _tokens(model, 2, 14)
    following = np.stack([tokens[:, 1:13], tokens[:, 2:14]], axis=-1)

    def states(transformer, tokens, following):
        return transformer.mtp_states(transformer.hidden_states(tokens)[0], following)[0]

    ours = run(model, weights, states, tokens[:, :12], following)
    theirs = transformers_mtp_states(model, parameters, router_bias, tokens[:, :12], following)
    for our_state, their_state in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(our_state) - their_state).max() < TOLERANCE * their_state.std()


@pytest.mark.parametrize("changes", [{"layers": 2, "mtp_depth": 0, "remat": "block"}, V2_LITE], ids=["v3", "v2_lite"])
def test_every_gradient_of_the_next_token_loss_is_that_of_torch(tiny_model, run, changes):
    model = tiny_model(**changes)
    parameters, router_bias = random_weights(model)
    tokens = _tokens(model, 2, 17)
    theirs = transformers_model(model, parameters, router_bias)
    logits = theirs(torch.tensor(tokens[:, :-1])).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[:, 1:]).flatten().long(), reduction="sum")
    loss.backward()

    positions = jnp.broadcast_to(jnp.arange(17, dtype=jnp.int32), tokens.shape)
    batch = Batch(jnp.asarray(tokens), jnp.ones_like(tokens), positions)

    def our_loss(transformer: Transformer) -> jax.Array:
        return loss_sums(transformer, batch, isolate_documents=False)[0].next_token

    value, gradients = run(model, (parameters, router_bias), value_and_gradients(our_loss))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    ours = transformers_weights(model, jax.tree.map(np.asarray, gradients))
    wanted = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert np.abs(ours[name] - gradient).max() < 1e-4 * np.abs(gradient).max(), name


def value_and_gradients(loss):
    """A function of a transformer as one that returns its value and its gradients in every parameter."""

    def both(transformer: Transformer) -> tuple[jax.Array, Tree]:
        structure, parameters, rest = nnx.split(transformer, nnx.Param, ...)
        value, gradients = jax.value_and_grad(lambda parameters: loss(nnx.merge(structure, parameters, rest)))(
            parameters
        )
        return value, nnx.to_pure_dict(gradients)

    return both


def _tokens(model: ModelConfig, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, model.vocabulary, (rows, length)).astype(np.int32)
