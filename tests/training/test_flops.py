"""Counts against published totals and against the model itself."""

import dataclasses

import jax
import pytest
from flax import nnx

from dsv3_jax.command_line import load_config
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training import flops
from dsv3_jax.training.flops import measured_matmul_rate, model_flops_per_token, parameter_counts

PUBLISHED = {
    "v3_671b": (671_026_419_200, 11_610_068_224, 36_625_618_432),
    "v2_236b": (235_741_434_880, 0, 20_851_512_320),
    "v2_lite": (15_706_484_224, 0, 2_451_435_008),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_released_models(name):
    assert tuple(parameter_counts(load_config(name).model)) == PUBLISHED[name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"query_latent": None, "selection_bias": False, "shared_experts": 0, "mtp_depth": 0},
        {"mtp_depth": 2, "dense_layers": 0, "shared_experts": 2},
        {"dense_layers": 4},
    ],
)
def test_parameters_are_those_the_model_makes(changes):
    model = dataclasses.replace(load_config("tiny").model, **changes)
    made = nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(made, (nnx.Param, nnx.Variable))))
    in_mtp = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(made.mtp, (nnx.Param, nnx.Variable))))
    counts = parameter_counts(model)
    assert (counts.main + counts.mtp, counts.mtp) == (size, in_mtp)


def test_flops_of_v3_by_the_figures_of_the_papers():
    model = dataclasses.replace(load_config("v3_671b").model, mtp_depth=0)
    at_one, at_4096 = model_flops_per_token(model, 1), model_flops_per_token(model, 4096)
    # 6 a parameter a token passes; norms and biases, under 10^-4 of them, are no matmuls. One token attends to itself.
    attention = 3 * 2 * 61 * 128 * (192 + 128)
    assert at_one - attention == pytest.approx(6 * 36_625_618_432, rel=1e-4)
    assert at_one - attention < 6 * 36_625_618_432
    assert at_4096 - at_one == attention * (4097 / 2 - 1)


def test_flops_of_an_mtp_module():
    model = load_config("v3_671b").model
    alone = dataclasses.replace(model, mtp_depth=0)
    difference = model_flops_per_token(model, 1) - model_flops_per_token(alone, 1) - 3 * 2 * 128 * (192 + 128)
    # Active parameters of the module, the shared head once (its embedding, as large, is a lookup).
    assert difference == pytest.approx(6 * (2_541_458_688 - 129_280 * 7168), rel=1e-4)


def test_flops_do_not_depend_on_how_many_experts_wait():
    model = load_config("tiny").model
    twice = dataclasses.replace(model, experts=2 * model.experts)
    router = 6 * model.width * model.experts * (model.moe_layers + model.mtp_depth)
    assert model_flops_per_token(twice, 64) - model_flops_per_token(model, 64) == router


def test_matmul_rate_weighs_shapes_by_their_time(monkeypatch):
    model = dataclasses.replace(
        load_config("tiny").model, vocabulary=2048, width=160, layers=2, dense_layers=1, dense_ffn_width=448,
        query_latent=96, key_value_latent=64, expert_ffn_width=96, mtp_depth=0,
    )  # fmt: skip
    timed: list[tuple[int, int, int]] = []

    def one_second(shape: tuple[int, int, int], precision: str) -> float:
        timed.append(shape)
        return 1.0

    monkeypatch.setattr(flops, "_matmul_seconds", one_second)
    rate = measured_matmul_rate(model, 1024)
    assert len(set(timed)) == len(timed)
    assert {(256, 160, 192), (256, 96, 160), (1024, 160, 2048), (1024, 64, 256), (1024, 160, 192)} <= set(timed)
    # By hand: five attention matrices a layer, two dense, router, two shared, 16 experts of two, head.
    matmuls = 2 * 5 + 2 + 1 + 2 + 2 * 16 + 1
    active = model_flops_per_token(model, 0) - 3 * 2 * 2 * model.heads * (48 + 32) / 2
    assert rate == pytest.approx(1024 * active / 3 / matmuls)


def test_matmul_rate_is_that_of_a_machine():
    model = load_config("tiny").model
    assert 1e8 < measured_matmul_rate(model, 64) < 1e16
