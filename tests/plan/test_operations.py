"""FLOPs of traced programs against counts by hand and against the model's own formula."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from configs.tiny import config as tiny
from dsv3_jax.kernels import grouped_matmul
from dsv3_jax.model.functional import skeleton_of
from dsv3_jax.plan.operations import matrix_flops
from dsv3_jax.plan.programs import traced_training_step
from dsv3_jax.training.flops import model_flops_per_token
from sharding.mesh import on_mesh, one_device


def _flops(function, *arguments, filled: float = 1.0):
    return matrix_flops(jax.jit(function).trace(*arguments).jaxpr.jaxpr, filled)


X, W = jnp.ones((6, 10)), jnp.ones((10, 4))
ONE = 2 * 6 * 10 * 4


def test_a_product_counts_two_a_multiply_add_by_the_type_of_its_operands():
    assert _flops(jnp.matmul, X, W) == {"float32": ONE}
    assert _flops(jnp.matmul, X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)) == {"bfloat16": ONE}
    batched = _flops(lambda x, y: jnp.einsum("bhsd,bhtd->bhst", x, y), jnp.ones((2, 3, 5, 7)), jnp.ones((2, 3, 11, 7)))
    assert batched == {"float32": 2 * 2 * 3 * 5 * 11 * 7}


def test_a_gradient_costs_twice_the_product_and_recomputation_once_more():
    def loss(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w.T).sum()

    assert _flops(jax.value_and_grad(loss, (0, 1)), X, W) == {"float32": 2 * 3 * ONE}
    assert _flops(jax.value_and_grad(jax.checkpoint(loss), (0, 1)), X, W) == {"float32": 2 * 4 * ONE}


def test_what_no_result_depends_on_is_not_counted():
    def of_first_alone(x, w):
        _, transpose = jax.vjp(jnp.matmul, x, w)
        return transpose(jnp.ones((6, 4)))[0]

    assert _flops(of_first_alone, X, W) == {"float32": ONE}


def test_loops_count_as_often_as_they_run_and_branches_once():
    square = jnp.ones((8, 8))
    product = 2 * 8**3

    def looped(x):
        return jax.lax.scan(lambda x, _: (jax.lax.fori_loop(0, 3, lambda _, y: y @ y, x), None), x, None, length=5)[0]

    assert _flops(looped, square) == {"float32": 15 * product}
    assert _flops(lambda n, x: jax.lax.fori_loop(0, n, lambda _, y: y @ y, x), 7, square) == {"float32": product}
    branches = _flops(lambda p, x: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x), True, square)
    assert branches == {"float32": 2 * product}


@pytest.mark.parametrize("filled", [1.0, 0.5])
def test_grouped_rows_meet_one_matrix_each_and_only_those_that_there_are(filled):
    rows, matrices, sizes = jnp.ones((12, 10)), jnp.ones((3, 10, 4)), jnp.array([5, 0, 7])

    def loss(rows, matrices):
        return (jax.lax.ragged_dot(rows, matrices, sizes) ** 2).sum()

    counted = _flops(jax.grad(loss, (0, 1)), rows, matrices, filled=filled)
    assert counted == {"float32": filled * 3 * 2 * 12 * 10 * 4}


@pytest.mark.parametrize(("name", "share"), [("grouped_matmul", 0.5), ("flash", 1.0)])
def test_kernels_count_what_they_say_of_themselves(name, share):
    def kernel(x, out):
        out[...] = x[...]

    def call(x):
        cost = pl.CostEstimate(flops=1000, transcendentals=0, bytes_accessed=0)
        return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=cost, name=name)(x)

    def twice(x):
        return jax.lax.scan(lambda x, _: (call(x), None), x, None, length=2)[0]

    assert _flops(twice, jnp.ones((8, 128)), filled=0.5) == {"float32": 2 * 1000 * share}


def test_on_a_mesh_it_is_what_one_device_does(mesh_with):
    mesh = mesh_with(data=8)
    function = on_mesh(lambda x, w: x @ w, mesh, (PartitionSpec("data"), PartitionSpec()), PartitionSpec("data"))
    assert _flops(function, jnp.ones((8 * 6, 10)), W) == {"float32": ONE}


@pytest.fixture
def step_flops(monkeypatch):
    """`step_flops(remat)`: of a step of two rows of 64 tokens, with grouped products that can be counted."""
    monkeypatch.setattr(grouped_matmul, "platform", lambda: "gpu")
    training = dataclasses.replace(tiny.training, batch_size=2, sequence_length=64, tokens=4096)

    def count(remat: str) -> float:
        model = dataclasses.replace(tiny.model, remat=remat)
        config = dataclasses.replace(tiny, model=model, training=training)
        traced, _ = traced_training_step(config, skeleton_of(model), one_device())
        return sum(matrix_flops(traced.jaxpr.jaxpr).values())

    return count


def test_a_training_step_counts_the_models_flops_and_what_its_attention_computes_besides(step_flops):
    """Without recomputation it is the formula, attention aside."""
    counted, model, tokens = step_flops("none"), tiny.model, 2 * 64
    heads = model.heads * (model.query_key_head_dim + model.value_head_dim)
    formula = model_flops_per_token(model, 64) - 3 * 2 * (model.layers + 1) * heads * 65 / 2
    # Forward two products of S x S a head; backward the first again, and two for each of them.
    squares = 2 * 64 * (model.layers + 1) * (heads + model.heads * model.query_key_head_dim + 2 * heads)
    assert counted == pytest.approx(tokens * (formula + squares), rel=1e-9)


def test_up_projections_and_the_router_are_all_that_is_multiplied_again_where_they_alone_are_recomputed(step_flops):
    """V3 section 3.2.3: norms and MLA's up-projections, and SwiGLU, which is no product."""
    model, tokens = tiny.model, 2 * 64
    query_up = model.query_latent * model.heads * model.query_key_head_dim
    key_value_up = model.key_value_latent * model.heads * (model.nope_head_dim + model.value_head_dim)
    routers = (model.moe_layers + model.mtp_depth) * model.width * model.experts
    again = 2 * tokens * ((model.layers + model.mtp_depth) * (query_up + key_value_up) + routers)
    assert step_flops("up_projections") - step_flops("none") == again
    assert step_flops("block") - step_flops("none") > 2 * again
