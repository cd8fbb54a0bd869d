"""Tokens through experts on one, two, four and eight devices, against the dense sum over all experts: any routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding.dispatch import Routes, nodes_per_token, through_experts
from sharding.exchange import queues_of, rounds_needed
from sharding.mesh import on_mesh

E, D, K = 16, 4, 3
TOKENS = 48
LAYOUTS = {
    "1": {},
    "2": {"expert": 2},
    "4": {"expert": 4},
    "8": {"expert": 8},
    "2 nodes of 4": {"node": 2, "expert": 4},
    "4 nodes of 2": {"node": 4, "expert": 2},
    "8 nodes": {"node": 8},
}


def _random(tokens: int) -> np.ndarray:
    random = np.random.default_rng(tokens)
    return np.stack([random.permutation(E)[:K] for _ in range(tokens)])


def _skewed(tokens: int) -> np.ndarray:
    """Half of all pairs on two experts, the rest falling off geometrically; every device's tokens alike."""
    random, share = np.random.default_rng(1), 0.7 ** np.arange(E)
    return np.stack([random.choice(E, K, replace=False, p=share / share.sum()) for _ in range(tokens)])


ROUTINGS = {
    "random": _random(TOKENS),
    "all to one device": np.tile([14, 15, 13], (TOKENS, 1)),
    "one device empty": 2 + _random(TOKENS) % (E - 2),
    "one token a device": _random(8),
    "skewed": _skewed(TOKENS),
    "a quarter of the tokens each to another quarter of the experts": np.repeat(
        [[12, 13, 14], [0, 1, 2], [4, 5, 6], [8, 9, 10]], TOKENS // 4, axis=0
    ),
}


def _experts(matrices_eDD, rows_MD, weights_M, sizes_e):
    """tanh(row times its expert's matrix) times its weight; of what is no row, NaN."""
    stop_e = jnp.cumsum(sizes_e)
    expert_M = jnp.searchsorted(stop_e, jnp.arange(len(rows_MD)), side="right")
    is_row_M1 = (jnp.arange(len(rows_MD)) < stop_e[-1])[:, None]
    rows_MD = jnp.where(is_row_M1, rows_MD, 0)
    answers_MD = jnp.einsum("md,mdf->mf", rows_MD, matrices_eDD[expert_M], precision="highest")
    return jnp.where(is_row_M1, jnp.tanh(answers_MD) * weights_M[:, None], jnp.nan)


def _dense(matrices_EDD, x_ND, weights_NK, experts_NK):
    """Every expert for every token, in float64."""
    answers_END = np.tanh(np.einsum("nd,edf->enf", x_ND, matrices_EDD))
    return sum(
        weights_NK[:, [choice]] * answers_END[experts_NK[:, choice], np.arange(len(x_ND))]
        for choice in range(experts_NK.shape[1])
    )


def _inputs(experts_NK):
    random = np.random.default_rng(2)
    tokens = len(experts_NK)
    return (
        random.normal(size=(E, D, D)),
        random.normal(size=(tokens, D)),
        random.uniform(0.1, 1, size=(tokens, K)),
        random.normal(size=(tokens, D)),
    )


@functools.cache
def _compiled(mesh, tokens: int, routes: Routes):
    axes = mesh.axis_names

    def of_device(matrices, x_ND, weights_NK, experts_NK, cotangent_ND):
        out_ND, transpose = jax.vjp(
            lambda *floats: through_experts(_experts, *floats, experts_NK, routes), matrices, x_ND, weights_NK
        )
        return out_ND, transpose(cotangent_ND)

    spec = PartitionSpec(axes or None)
    return jax.jit(on_mesh(of_device, mesh, spec, spec))


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("experts_NK", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize(
    ("sizes", "once_a_node"),
    [
        *(pytest.param(sizes, True, id=name) for name, sizes in LAYOUTS.items()),
        pytest.param({"node": 2, "expert": 4}, False, id="2 nodes of 4, once an expert"),
    ],
)
def test_answers_and_gradients_are_those_of_the_dense_sum(sizes, once_a_node, experts_NK, factor, mesh_with):
    mesh, (matrices, x, weights, cotangent) = mesh_with(**sizes), _inputs(experts_NK)
    routes = Routes(E, groups=E, groups_per_token=K, factor=factor, once_a_node=once_a_node)
    floats = [jnp.asarray(each, jnp.float32) for each in (matrices, x, weights)]
    found, gradients = _compiled(mesh, len(x), routes)(
        *floats, jnp.asarray(experts_NK, jnp.int32), jnp.asarray(cotangent, jnp.float32)
    )
    wanted = _dense(matrices, x, weights, experts_NK)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

    def dense(matrices, x, weights):
        answers = jnp.tanh(jnp.einsum("nd,nkdf->nkf", x, matrices[experts_NK], precision="highest"))
        return (answers * weights[:, :, None]).sum(axis=1)

    with jax.enable_x64():
        _, transpose = jax.vjp(dense, *(jnp.asarray(each, jnp.float64) for each in (matrices, x, weights)))
        exact = [np.asarray(each) for each in transpose(jnp.asarray(cotangent, jnp.float64))]
    for gradient, wanted in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("experts_NK", "factor", "rounds"),
    [
        (np.arange(TOKENS * K).reshape(TOKENS, K) % E, 1.0, 1),
        (np.tile([0, 1, 0], (TOKENS, 1)), 1.0, 8),
        (np.tile([0, 1, 0], (TOKENS, 1)), 2.0, 4),
        (np.tile([0, 1, 0], (TOKENS, 1)), 8.0, 1),
        (
            np.where(np.arange(TOKENS)[:, None] == 0, [0, 0, 0], 2 + np.arange(TOKENS * K).reshape(TOKENS, K) % 14),
            1.0,
            2,
        ),
    ],
    ids=["balanced", "all to one device", "twice the room", "room for the worst", "a little over"],
)
def test_there_are_as_many_rounds_as_the_fullest_device_needs(experts_NK, factor, rounds, mesh_with):
    mesh, calls = mesh_with(expert=8), []

    def counted(matrices, rows_MD, weights_M, sizes_e):
        jax.debug.callback(lambda: calls.append(1))
        return _experts(matrices, rows_MD, weights_M, sizes_e)

    matrices, x, weights, _ = (jnp.asarray(each, jnp.float32) for each in _inputs(experts_NK))
    routes = Routes(E, E, K, factor, True)

    def of_device(matrices, x_ND, weights_NK, experts_NK):
        sizes_E = jnp.sum(experts_NK[..., None] == jnp.arange(E), axis=(0, 1), dtype=jnp.int32)
        needed = rounds_needed(queues_of(sizes_E, ("expert",)), round(factor * experts_NK.size))
        return through_experts(counted, matrices, x_ND, weights_NK, experts_NK, routes), needed

    spec = PartitionSpec("expert")
    step = jax.jit(on_mesh(of_device, mesh, spec, (spec, PartitionSpec())))
    _, needed = jax.block_until_ready(step(matrices, x, weights, jnp.asarray(experts_NK, jnp.int32)))
    jax.effects_barrier()
    assert needed == rounds and len(calls) == 8 * rounds


def _temporary_bytes(mesh, factor: float, once_a_node: bool) -> int:
    """Of one device's dispatch of 64 tokens of 8192 numbers, forward and backward."""
    width, tokens = 8192, 64 * mesh.size
    routes = Routes(E, E, K, factor, once_a_node)

    def experts(matrices, rows_MD, weights_M, sizes_e):
        return rows_MD * weights_M[:, None] * matrices[0, 0]

    def of_device(matrices, x_ND, weights_NK, experts_NK):
        return jax.grad(
            lambda *floats: jnp.sum(through_experts(experts, *floats, experts_NK, routes) ** 2), argnums=(1, 2)
        )(matrices, x_ND, weights_NK)

    spec = PartitionSpec(mesh.axis_names)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((E, 1), (tokens, width), (tokens, K))]
    experts_NK = jax.ShapeDtypeStruct((tokens, K), jnp.int32)
    compiled = jax.jit(on_mesh(of_device, mesh, spec, spec)).lower(*arguments, experts_NK).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_follows_the_balanced_load_not_what_routing_could_come_to(mesh_with):
    """Room for the worst routing is four times as much on eight devices as on two, and is taken where asked for."""
    two, eight, worst = (
        _temporary_bytes(mesh_with(expert=devices), factor, True) for devices, factor in ((2, 2.0), (8, 2.0), (8, 8.0))
    )
    assert eight < 1.25 * two and worst > 2.5 * eight


def test_memory_of_two_levels_does_not_grow_with_the_devices_either(mesh_with):
    four, eight = (_temporary_bytes(mesh_with(node=2, expert=devices), 2.0, True) for devices in (2, 4))
    assert eight < 1.05 * four


@pytest.mark.parametrize(
    ("groups", "groups_per_token", "nodes", "expected"),
    [(8, 4, 8, 4), (8, 4, 4, 4), (8, 4, 2, 2), (8, 2, 4, 2), (8, 4, 16, 8), (1, 1, 4, 4), (8, 8, 32, 8)],
)
def test_a_token_crosses_to_no_more_nodes_than_its_groups_are_on(groups, groups_per_token, nodes, expected):
    assert nodes_per_token(Routes(256, groups, groups_per_token, 2.0, True), 8, nodes) == expected
