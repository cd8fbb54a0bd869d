"""The mixture of experts against a loop over tokens and their experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.model.moe import MixtureOfExperts, RouterStatistics, answered
from dsv3_jax.model_config import ModelConfig
from tests.reference import routing
from tests.reference import transformer as reference
from tests.reference.weights import Tree, random_module


@pytest.fixture
def compare(call):
    """`compare(model, rows, length)` asserts that output and statistics are those of the loop."""

    def assert_same(model: ModelConfig, rows: int, length: int) -> None:
        block, weights = random_module(MixtureOfExperts, model)
        x_BSD = _inputs(model, rows, length)
        found, routed = call(block, x_BSD)
        wanted, gates = zip(*(_reference(x_SD, weights, model) for x_SD in x_BSD), strict=True)
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.std(wanted))
        np.testing.assert_array_equal(routed.experts_NK, [gate.experts for gate in sum(gates, [])])
        statistics = RouterStatistics.of(routed, np.ones((rows, length), bool), model)
        np.testing.assert_array_equal(statistics.load_E, routing.load(sum(gates, []), model))
        total = sum(routing.balance_loss(of_row, model) for of_row in gates)
        assert float(statistics.balance) == pytest.approx(total, rel=1e-5)

    return assert_same


def _inputs(model: ModelConfig, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(rows * length).standard_normal((rows, length, model.width)).astype(np.float32)


def _reference(x_SD: np.ndarray, weights: Tree, model: ModelConfig):
    bias_E = weights["router"]["bias"] if model.selection_bias else None
    return reference.mixture_of_experts(x_SD.astype(np.float64), weights, bias_E, model)


@pytest.mark.parametrize(
    ("changes", "rows", "length"),
    [
        ({}, 3, 30),
        ({}, 1, 1),
        ({}, 4, 2),
        ({"shared_experts": 0}, 2, 5),
        (
            {"score_function": "softmax", "group_score": "max", "selection_bias": False, "normalize_weights": False},
            2,
            9,
        ),
        ({"experts_per_token": 8, "groups_per_token": 4}, 2, 7),
    ],
    ids=["v3", "one_token", "few_tokens", "no_shared_expert", "v2", "every_expert"],
)
def test_each_token_is_the_weighted_sum_of_its_experts_and_the_shared_one(tiny_model, compare, changes, rows, length):
    compare(tiny_model(**changes), rows, length)


def test_trap_R8_the_routed_scale_leaves_the_shared_experts_alone(tiny_model, compare):
    compare(tiny_model(shared_experts=3, routed_scale=16.0), 2, 5)


@pytest.mark.parametrize(
    ("busy", "rows", "length"),
    [([0, 1, 4], 2, 20), ([5, 6, 7], 2, 20), ([5, 6, 7], 2, 4), ([5, 6, 7], 1, 1)],
    ids=["first", "last", "few_tokens", "one_token"],
)
def test_experts_without_a_token_change_nothing_and_get_no_gradient(tiny_model, busy, rows, length):
    """All tokens at the same three experts, as far from balance as routing can be."""
    model = tiny_model()
    block, weights = random_module(MixtureOfExperts, model)
    weights["router"]["bias"] = np.where(np.isin(np.arange(8), busy), 9.0, -9.0).astype(np.float32)
    block.router.bias[...] = weights["router"]["bias"]
    x_BSD = _inputs(model, rows, length)
    (found, routed), gradients = _outputs_and_gradients(*nnx.split(block, nnx.Param, ...), x_BSD)
    wanted = [_reference(x_SD, weights, model)[0] for x_SD in x_BSD]
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.std(wanted))
    idle = np.setdiff1d(np.arange(8), busy)
    np.testing.assert_array_equal(np.sort(routed.experts_NK), [busy] * (rows * length))
    for gradient in jax.tree.leaves(nnx.to_pure_dict(gradients)["experts"]):
        np.testing.assert_array_equal(np.asarray(gradient)[idle], 0.0)
        assert (np.abs(np.asarray(gradient)[busy]).reshape(3, -1).max(axis=1) > 0).all()


@functools.partial(jax.jit, static_argnums=0)
def _outputs_and_gradients(structure, parameters, biases, x_BSD):
    def squares(parameters):
        outputs = nnx.merge(structure, parameters, biases)(x_BSD)
        return jnp.sum(outputs[0] * outputs[0]), outputs

    gradients, outputs = jax.grad(squares, has_aux=True)(parameters)
    return outputs, gradients


def test_trap_B5_what_padding_routes_to_is_not_counted(tiny_model, call):
    model = tiny_model()
    block, weights = random_module(MixtureOfExperts, model)
    x_BSD = _inputs(model, 2, 6)
    _, routed = call(block, x_BSD)
    statistics = RouterStatistics.of(routed, np.array([[True] * 4 + [False] * 2, [False] * 6]), model)
    _, gates = _reference(x_BSD[0, :4], weights, model)
    np.testing.assert_array_equal(statistics.load_E, routing.load(gates, model))
    assert float(statistics.balance) == pytest.approx(routing.balance_loss(gates, model), rel=1e-5)


def test_bfloat16_experts_keep_a_float32_routing(tiny_model, call):
    model = tiny_model(precision="bfloat16")
    block, weights = random_module(MixtureOfExperts, model)
    x_BSD = jnp.asarray(_inputs(model, 1, 16), jnp.bfloat16)
    found, routed = call(block, x_BSD)
    statistics = RouterStatistics.of(routed, np.ones((1, 16), bool), model)
    wanted, gates = _reference(np.asarray(x_BSD[0], np.float64), weights, model)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(statistics.load_E, routing.load(gates, model))
    assert float(statistics.balance) == pytest.approx(routing.balance_loss(gates, model), rel=1e-5)
    assert 1e-4 < np.abs(np.asarray(found[0], np.float64) - wanted).max() / wanted.std() < 0.05


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-6)])
def test_gradients_of_the_experts_are_those_of_their_expression(precision, tolerance, tiny_model):
    model = tiny_model(precision=precision)
    block, _ = random_module(MixtureOfExperts, model)
    structure, state = nnx.split(block.experts)
    random, sizes = np.random.default_rng(0), np.zeros(model.experts, np.int32)
    sizes[[0, 2, 3]] = 5, 1, 30
    rows_MD = jnp.asarray(random.standard_normal((36, model.width)), precision)
    weights_M = jnp.asarray(random.uniform(0.1, 1, 36), jnp.float32)
    cotangent_MD = jnp.asarray(random.standard_normal((36, model.width)), precision)

    def experts(state, rows_MD, weights_M):
        return answered(nnx.merge(structure, state).matrices(), rows_MD, weights_M, jnp.asarray(sizes))

    def expression(state, rows_MD, weights_M):
        expert_M = np.repeat(np.arange(model.experts), sizes)
        gate_up, down = (state[name][...][expert_M] for name in ("gate_up", "down"))
        gate, up = jnp.einsum("md,mdcf->cmf", rows_MD, gate_up)
        return weights_M[:, None] * jnp.einsum("mf,mfd->md", gate * jax.nn.sigmoid(gate) * up, down)

    found = jax.vjp(experts, state, rows_MD, weights_M)[1](cotangent_MD)
    exact = jax.vjp(expression, state, rows_MD.astype(jnp.float32), weights_M)[1](cotangent_MD.astype(jnp.float32))
    assert found[1].dtype == precision and found[2].dtype == jnp.float32
    for gradient, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, atol=tolerance * float(jnp.abs(wanted).max()))
