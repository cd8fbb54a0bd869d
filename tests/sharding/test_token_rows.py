"""Dispatch and combine against a loop over tokens, gradients against the dense sum over all experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.token_rows import combine, dispatch

EXPERTS, D = 5, 3


def _random_routing(tokens: int, choices: int) -> np.ndarray:
    random = np.random.default_rng(tokens)
    return np.stack([random.permutation(EXPERTS)[:choices] for _ in range(tokens)])


ROUTINGS = {
    "random": _random_routing(40, 2),
    "one token": np.array([[3, 0]]),
    "one choice": _random_routing(9, 1),
    "all to the same experts": np.tile([4, 1], (12, 1)),
    "all to one expert": np.full((12, 1), 2),
    "first and last experts empty": np.array([[1, 3], [3, 2], [2, 1], [3, 1]]),
    "every expert": _random_routing(6, EXPERTS),
}
every_routing = pytest.mark.parametrize("experts_NK", ROUTINGS.values(), ids=ROUTINGS.keys())


def _inputs(experts_NK: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(1)
    tokens, choices = experts_NK.shape
    x_ND, weights_NK = random.normal(size=(tokens, D)), random.normal(size=(tokens, choices))
    matrices_EDF = random.normal(size=(EXPERTS, D, D))
    return *(jnp.asarray(each, jnp.float32) for each in (x_ND, weights_NK, matrices_EDF)), jnp.asarray(
        experts_NK, jnp.int32
    )


def _through_experts(x_ND, weights_NK, matrices_EDD, experts_NK):
    """Dispatch, multiply each row by its weight and its expert's matrix, combine."""
    rows_MD, weights_M, plan = dispatch(x_ND, weights_NK, experts_NK, EXPERTS)
    expert_M = jnp.repeat(jnp.arange(EXPERTS), plan.group_sizes_E, total_repeat_length=rows_MD.shape[0])
    return combine(jnp.einsum("m,md,mdf->mf", weights_M, rows_MD, matrices_EDD[expert_M], precision="highest"), plan)


def _dense(x_ND, weights_NK, matrices_EDD, experts_NK):
    """Every expert for every token, times its weight or 0."""
    weight_NE = (jax.nn.one_hot(experts_NK, EXPERTS) * weights_NK[..., None]).sum(axis=1)
    return jnp.einsum("nd,edf,ne->nf", x_ND, matrices_EDD, weight_NE, precision="highest")


@every_routing
def test_every_pair_gets_a_row_next_to_those_of_its_expert(experts_NK):
    x_ND, weights_NK, _, experts = _inputs(experts_NK)
    rows_MD, weights_M, plan = jax.jit(dispatch, static_argnums=3)(x_ND, weights_NK, experts, EXPERTS)
    np.testing.assert_array_equal(plan.group_sizes_E, np.bincount(experts_NK.ravel(), minlength=EXPERTS))
    assert plan.group_sizes_E.dtype == jnp.int32 and rows_MD.shape == (experts_NK.size, D)
    end_E = np.cumsum(plan.group_sizes_E)
    for expert in range(EXPERTS):
        rows = slice(end_E[expert] - plan.group_sizes_E[expert], end_E[expert])
        of_expert = experts_NK == expert
        expected = np.asarray(x_ND)[np.flatnonzero(of_expert.any(axis=1))]
        np.testing.assert_array_equal(np.sort(rows_MD[rows], axis=0), np.sort(expected, axis=0))
        np.testing.assert_array_equal(np.sort(weights_M[rows]), np.sort(np.asarray(weights_NK)[of_expert]))


@every_routing
def test_what_experts_answer_comes_back_weighted(experts_NK):
    inputs = _inputs(experts_NK)
    x_ND, weights_NK, matrices_EDD = (np.asarray(each, np.float64) for each in inputs[:3])
    expected = np.zeros(x_ND.shape)
    for token, choice in np.ndindex(experts_NK.shape):
        expected[token] += weights_NK[token, choice] * (x_ND[token] @ matrices_EDD[experts_NK[token, choice]])
    np.testing.assert_allclose(jax.jit(_through_experts)(*inputs), expected, rtol=1e-5, atol=1e-5)


@every_routing
def test_gradients_of_tokens_weights_and_experts_are_those_of_the_dense_sum(experts_NK):
    *inputs, experts = _inputs(experts_NK)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=inputs[0].shape), jnp.float32)

    def gradients(layer):
        return jax.jit(jax.grad(lambda *inputs: (layer(*inputs, experts) * cotangent).sum(), (0, 1, 2)))(*inputs)

    for found, expected in zip(gradients(_through_experts), gradients(_dense), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_experts_no_token_went_to_get_no_gradient():
    *inputs, experts = _inputs(ROUTINGS["first and last experts empty"])
    gradient = jax.jit(jax.grad(lambda *inputs: _through_experts(*inputs, experts).sum(), 2))(*inputs)
    assert [bool(np.any(each)) for each in np.asarray(gradient)] == [False, True, True, True, False]


def test_a_token_to_itself_and_back_is_itself():
    x_ND, weights_NK, _, experts = _inputs(ROUTINGS["random"])
    rows_MD, _, plan = dispatch(x_ND, weights_NK, experts, EXPERTS)
    np.testing.assert_array_equal(combine(rows_MD / 2, plan), x_ND)


def test_bfloat16_rows_are_summed_in_float32():
    tokens = 6
    experts = jnp.asarray(ROUTINGS["every expert"], jnp.int32)
    x_ND = jnp.ones((tokens, D), jnp.bfloat16)
    weights_NK = jnp.tile(jnp.array([256.0, 1.0, 1.0, 1.0, 1.0]), (tokens, 1))

    def there_and_back(x_ND):
        rows_MD, weights_M, plan = dispatch(x_ND, weights_NK, experts, EXPERTS)
        return combine(rows_MD * weights_M[:, None].astype(rows_MD.dtype), plan)

    out, backward = jax.vjp(there_and_back, x_ND)
    assert out.dtype == jnp.bfloat16
    # 256 + 1 is 256 in bfloat16, so a bfloat16 sum would never leave it.
    np.testing.assert_array_equal(np.asarray(out, np.float32), 260)
    np.testing.assert_array_equal(np.asarray(backward(jnp.ones_like(out))[0], np.float32), 260)


def test_equal_choices_keep_the_order_of_tokens():
    """Rows are stable, so that a run is reproducible on every backend."""
    x_ND = jnp.arange(8.0)[:, None]
    rows_MD, *_ = dispatch(x_ND, jnp.ones((8, 1)), jnp.array([[1], [0]] * 4, jnp.int32), 2)
    assert rows_MD[:, 0].tolist() == [1, 3, 5, 7, 0, 2, 4, 6]
