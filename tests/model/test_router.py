"""The gate, its load, the balance loss and the bias update against loops over single tokens in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.model.functional import abstract_trees, skeleton_of
from dsv3_jax.model.router import Router, Routing, balance_loss, choose_experts, expert_load, updated_bias
from dsv3_jax.model_config import ModelConfig
from tests.reference import routing as reference
from tests.reference.weights import random_module

V2 = {"score_function": "softmax", "group_score": "max", "selection_bias": False, "normalize_weights": False}


@pytest.fixture
def routed(call):
    """`routed(model)`: our routing of random tokens and the reference's."""

    def route(
        model: ModelConfig, tokens: int = 60, bias: tuple[float, float] = (0.0, 0.3), dtype=np.float32
    ) -> tuple[Routing, list[reference.Gate]]:
        x_ND = jnp.asarray(np.random.default_rng(5).standard_normal((tokens, model.width)), dtype)
        router, weights = random_module(Router, model, bias=bias)
        wide_ND, wide_DE = np.asarray(x_ND, np.float64), weights["weight"].astype(np.float64)
        return call(router, x_ND), [reference.route(x_D, wide_DE, weights.get("bias"), model) for x_D in wide_ND]

    return route


def _assert_same(found: Routing, wanted: list[reference.Gate]) -> None:
    np.testing.assert_array_equal(found.experts_NK, [gate.experts for gate in wanted])
    np.testing.assert_allclose(found.weights_NK, [gate.weights for gate in wanted], rtol=2e-5)
    np.testing.assert_allclose(found.scores_NE, [gate.scores for gate in wanted], rtol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": 24, "expert_groups": 3, "groups_per_token": 1, "experts_per_token": 8},
        {"expert_groups": 1, "groups_per_token": 1},
        {"groups_per_token": 4},
        {"experts_per_token": 1},
        {"groups_per_token": 1, "experts_per_token": 2},
        {"normalize_weights": False},
        {**V2, "routed_scale": 16.0},
        {**V2, "expert_groups": 8, "groups_per_token": 3},
        {**V2, "expert_groups": 1, "groups_per_token": 1, "routed_scale": 1.0},
    ],
    ids=[
        "v3",
        "one_of_three_groups",
        "one_group",
        "all_groups",
        "one_expert",
        "a_whole_group",
        "unnormalised",
        "v2",
        "groups_of_one",
        "v2_lite",
    ],
)
def test_routing_is_that_of_the_equations(tiny_model, routed, changes):
    _assert_same(*routed(tiny_model(**changes)))


def test_one_token_is_routed_as_among_many(tiny_model, routed):
    _assert_same(*routed(tiny_model(), tokens=1))


def test_trap_R1_weights_come_from_the_scores_without_the_bias(tiny_model, routed):
    found, wanted = routed(tiny_model(), bias=(0.0, 3.0))
    chosen = np.take_along_axis(np.asarray(found.scores_NE), np.asarray(found.experts_NK), axis=1)
    np.testing.assert_allclose(found.weights_NK, 2.5 * chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-5)
    _assert_same(found, wanted)


def test_trap_R2_a_groups_score_is_the_sum_of_its_two_best_biased_scores(tiny_model):
    model = tiny_model(expert_groups=2, groups_per_token=1, experts_per_token=2)
    selection = jnp.array([[0.9, 0.0, 0.1, 0.0, 0.6, 0.5, 0.0, 0.0]])
    np.testing.assert_array_equal(choose_experts(selection, model), [[4, 5]])
    by_maximum = dataclasses.replace(model, group_score="max")
    np.testing.assert_array_equal(choose_experts(selection, by_maximum), [[0, 2]])


def test_trap_R3_dropped_groups_are_masked_with_minus_infinity(tiny_model, routed):
    model = tiny_model()
    found, wanted = routed(model, bias=(-3.0, 0.3))
    _assert_same(found, wanted)
    # Zero instead of minus infinity would have preferred the dropped groups: every selection score is negative.
    groups = np.asarray(found.experts_NK) // (model.experts // model.expert_groups)
    assert max(len(set(row)) for row in groups) <= model.groups_per_token


def test_trap_R4_the_bias_is_float32_and_small_updates_are_not_lost(tiny_model):
    _, router_bias = abstract_trees(skeleton_of(tiny_model(precision="bfloat16")))
    assert {leaf.dtype for leaf in jax.tree.leaves(router_bias)} == {jnp.dtype(jnp.float32)}
    bias_E = jnp.full((2,), 5.0)
    for _ in range(10):
        bias_E = updated_bias(bias_E, jnp.array([0, 10]), 0.001)
    assert bias_E.dtype == jnp.float32
    np.testing.assert_allclose(bias_E, [5.01, 4.99], atol=1e-5)


def test_trap_R5_logits_are_float32_in_a_bfloat16_model(tiny_model, routed):
    model = tiny_model(precision="bfloat16")
    found, wanted = routed(model, dtype=jnp.bfloat16)
    assert found.weights_NK.dtype == found.scores_NE.dtype == jnp.float32
    # Logits rounded to bfloat16 would be off by 4e-3.
    _assert_same(found, wanted)


def test_trap_R6_weights_are_normalised_then_scaled(tiny_model, routed):
    found, _ = routed(tiny_model(routed_scale=2.5))
    np.testing.assert_allclose(found.weights_NK.sum(axis=1), 2.5, rtol=1e-6)
    plain, _ = routed(tiny_model(routed_scale=2.5, normalize_weights=False))
    chosen = np.take_along_axis(np.asarray(plain.scores_NE), np.asarray(plain.experts_NK), axis=1)
    np.testing.assert_allclose(plain.weights_NK, 2.5 * chosen, rtol=1e-6)


def test_scores_that_are_all_zero_do_not_divide_by_zero(tiny_model):
    model = tiny_model()
    router = Router(model, nnx.Rngs(0))
    router.weight[...] = -jnp.ones_like(router.weight[...])
    routing = router(jnp.full((1, model.width), 1000.0))
    assert float(routing.scores_NE.max()) == 0.0
    np.testing.assert_array_equal(routing.weights_NK, 0.0)


def test_trap_R9_a_model_without_selection_bias_holds_none(tiny_model):
    parameters, router_bias = abstract_trees(skeleton_of(tiny_model(**V2)))
    assert router_bias == {}
    assert set(parameters["moe_blocks"]["feed_forward"]["router"]) == {"weight"}


def test_trap_B1_the_bias_moves_by_exactly_the_speed(tiny_model):
    model, generator = tiny_model(), np.random.default_rng(0)
    bias_LE = generator.standard_normal((2, model.experts)).astype(np.float32)
    load_LE = generator.integers(0, 50, (2, model.experts)).astype(np.int32)
    load_LE[1] = 7
    found = np.asarray(updated_bias(jnp.asarray(bias_LE), jnp.asarray(load_LE), 0.5))
    wanted = [reference.updated_bias(*layer, 0.5) for layer in zip(bias_LE.tolist(), load_LE.tolist(), strict=True)]
    np.testing.assert_array_equal(found, np.array(wanted, np.float32))
    np.testing.assert_array_equal(found[1], bias_LE[1])


def test_trap_B3_a_load_just_under_the_mean_is_not_rounded_onto_it():
    # bfloat16 cannot tell 40840 from the mean, 40960; float32 cannot tell 2^24 + 1 from 2^24.
    np.testing.assert_array_equal(updated_bias(jnp.zeros(2), jnp.array([40840, 41080]), 1.0), [1.0, -1.0])
    above = 2**24 + 1
    np.testing.assert_array_equal(updated_bias(jnp.zeros(2), jnp.array([2**24, above]), 1.0), [1.0, -1.0])


def test_trap_B5_padding_counts_in_no_load_and_no_balance(tiny_model, routed):
    model = tiny_model()
    found, wanted = routed(model, tokens=24)
    valid_BS = jnp.array([[True] * 8, [True] * 5 + [False] * 3, [False] * 8])
    kept = [wanted[:8], wanted[8:13], []]
    load_E = expert_load(found.experts_NK, valid_BS.reshape(-1), model.experts)
    assert load_E.dtype == jnp.int32
    np.testing.assert_array_equal(load_E, reference.load(kept[0] + kept[1], model))
    total = sum(reference.balance_loss(gates, model) for gates in kept)
    assert float(balance_loss(found, valid_BS, model)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, V2], ids=["v3", "v2"])
def test_trap_B8_balance_is_a_sequences_own_and_of_scores_normalised_over_all_experts(tiny_model, routed, changes):
    model = tiny_model(**changes)
    found, wanted = routed(model, tokens=40)
    for rows in (1, 8):
        sequences = [wanted[start : start + 40 // rows] for start in range(0, 40, 40 // rows)]
        total = sum(reference.balance_loss(gates, model) for gates in sequences)
        valid_BS = jnp.ones((rows, 40 // rows), bool)
        assert float(balance_loss(found, valid_BS, model)) == pytest.approx(total, rel=1e-5)


def test_a_balanced_sequence_has_balance_one_and_a_collapsed_one_more(tiny_model):
    model = tiny_model(experts=4, experts_per_token=1, expert_groups=1, groups_per_token=1)
    every = jnp.arange(4)[:, None]
    even = Routing(every, jnp.ones((4, 1)), 0.1 + 0.8 * jnp.eye(4))
    assert float(balance_loss(even, jnp.ones((1, 4), bool), model)) == pytest.approx(1.0)
    collapsed = Routing(
        jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1)), jnp.tile(jnp.array([0.7, 0.1, 0.1, 0.1]), (4, 1))
    )
    assert float(balance_loss(collapsed, jnp.ones((1, 4), bool), model)) == pytest.approx(4 * 0.7)
