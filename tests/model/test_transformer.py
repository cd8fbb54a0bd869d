"""The whole model against the equations, and what must not change it: the future, other documents, padding."""

import re
from collections.abc import Iterator

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.model.functional import abstract_trees, initialize, put_together, skeleton_of, take_apart
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.training.losses import Batch, loss_sums
from tests.reference import transformer as reference
from tests.reference.weights import random_weights


def _tokens(model: ModelConfig, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, model.vocabulary, (rows, length)).astype(np.int32)


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 11),
        ({}, 1),
        ({"layers": 2, "dense_layers": 2, "mtp_depth": 0}, 5),
        ({"dense_layers": 0, "yarn_factor": 40.0, "yarn_original_length": 32, "yarn_mscale": 0.5, "layers": 2}, 70),
    ],
    ids=["v3", "one_token", "dense_alone", "yarn"],
)
def test_logits_are_those_of_the_equations(tiny_model, run, changes, length):
    model = tiny_model(**changes)
    weights, tokens = random_weights(model), _tokens(model, 2, length)
    found = run(model, weights, Transformer.__call__, tokens)
    wanted = np.stack([reference.logits(reference.plain_row(row), *weights, model) for row in tokens])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=2e-5 * wanted.std())


def test_documents_in_one_row_are_as_documents_apart(tiny_model, run):
    model = tiny_model()
    weights, tokens = random_weights(model), _tokens(model, 1, 11)
    positions = np.r_[0:4, 0:1, 0:6].astype(np.int32)[None]
    segments = np.repeat(np.int32([1, 2, 3]), [4, 1, 6])[None]
    together = np.asarray(run(model, weights, Transformer.__call__, tokens, positions, segments))[0]
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        apart = reference.logits(reference.plain_row(tokens[0, start:stop]), *weights, model)
        np.testing.assert_allclose(together[start:stop], apart, atol=2e-5 * apart.std())


def test_a_token_changes_no_earlier_logit(tiny_model, run):
    model = tiny_model()
    weights, tokens = random_weights(model), _tokens(model, 2, 11)
    before = np.asarray(run(model, weights, Transformer.__call__, tokens))
    tokens[:, 6] = (tokens[:, 6] + 1) % model.vocabulary
    after = np.asarray(run(model, weights, Transformer.__call__, tokens))
    np.testing.assert_allclose(after[:, :6], before[:, :6], atol=1e-5)
    assert np.abs(after - before)[:, 6:].max(axis=-1).min() > 0.01


def test_rows_of_the_vocabulary_that_no_token_uses_are_padding(tiny_model, run):
    """Their logits are computed; their embeddings change nothing."""
    model = tiny_model()
    weights, tokens = random_weights(model), _tokens(model, 2, 11) % 40
    before = run(model, weights, Transformer.__call__, tokens)
    assert before.shape == (2, 11, model.vocabulary)
    weights[0]["embedding"][40:] = np.nan
    np.testing.assert_array_equal(run(model, weights, Transformer.__call__, tokens), before)


def test_trees_survive_being_put_together_and_taken_apart(tiny_model):
    model = tiny_model(mtp_depth=2)
    weights = random_weights(model)
    again = take_apart(put_together(skeleton_of(model), *weights))
    assert jax.tree.structure(again) == jax.tree.structure(weights)
    for ours, given in zip(jax.tree.leaves(again), jax.tree.leaves(weights), strict=True):
        np.testing.assert_array_equal(ours, given)


def test_initial_weights_have_the_configured_spread_gains_one_and_biases_zero(tiny_model):
    model = tiny_model(
        layers=2, dense_layers=0, mtp_depth=0, shared_experts=0, query_latent=None, initializer_std=0.006
    )
    parameters, router_bias = initialize(model, seed=3)
    for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]:
        if path[-1].key == "gain":
            np.testing.assert_array_equal(leaf, 1.0)
        else:
            assert float(np.std(leaf)) == pytest.approx(0.006, rel=0.15), path
    for leaf in jax.tree.leaves(router_bias):
        np.testing.assert_array_equal(leaf, 0.0)
    # No two experts of any layers are alike.
    experts = np.asarray(parameters["moe_blocks"]["feed_forward"]["experts"]["down"]).reshape(16, -1)
    assert np.abs(np.corrcoef(experts) - np.eye(16)).max() < 0.5


def test_a_shape_that_cannot_be_built_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="model.rope_head_dim=7"):
        skeleton_of(tiny_model(rope_head_dim=7))


def test_trap_U3_the_compiled_program_does_not_grow_with_depth(tiny_model):
    def operations(layers: int) -> list[str]:
        model = tiny_model(layers=layers, remat="block")
        tokens = jnp.zeros((2, 9), jnp.int32)
        skeleton = skeleton_of(model)

        def total(parameters, router_bias):
            transformer = put_together(skeleton, parameters, router_bias)
            sums, _ = loss_sums(transformer, Batch(tokens, tokens + 1, tokens), isolate_documents=False)
            return sums.next_token + sums.mtp.sum() + sums.balance

        text = jax.jit(jax.grad(total)).lower(*abstract_trees(skeleton)).as_text()
        return re.findall(r"stablehlo\.\w+|func\.call", text)

    shallow, deep = operations(1 + 3), operations(1 + 12)
    assert len(shallow) > 500
    assert deep == shallow


def test_bfloat16_computes_matmuls_in_bfloat16_and_the_rest_in_float32(tiny_model, run):
    model = tiny_model(precision="bfloat16")
    weights, tokens, skeleton = random_weights(model), _tokens(model, 2, 11), skeleton_of(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_trees(skeleton))} == {jnp.dtype(jnp.float32)}
    jaxpr = jax.make_jaxpr(lambda weights: put_together(skeleton, *weights)(tokens))(weights)
    types: dict[str, set[str]] = {}
    for equation in _equations(jaxpr.jaxpr):
        types.setdefault(equation.primitive.name, set()).add(str(equation.outvars[0].aval.dtype))
    # Softmax, norm statistics, rotation, sigmoid scores' choice; only matmuls and activations may be narrow.
    for name in ("exp", "rsqrt", "cos", "sin", "top_k"):
        assert types[name] == {"float32"}, name
    assert "bfloat16" in types["dot_general"]
    logits = run(model, weights, Transformer.__call__, tokens)
    assert logits.dtype == jnp.float32
    wanted = np.stack([reference.logits(reference.plain_row(row), *weights, model) for row in tokens])
    assert 1e-3 < np.abs(np.asarray(logits) - wanted).mean() / wanted.std() < 0.1


def _equations(jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
