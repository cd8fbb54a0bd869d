"""What crosses between nodes: bytes of the compiled program against arithmetic, and rows of programs that run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import sharding.exchange
from benchmarks.dispatch_bytes import Layer, bytes_between, compiled_traffic, expert_mesh, rows_between
from dsv3_jax.model.router import choose_experts
from sharding.dispatch import Routes, nodes_per_token, through_experts
from sharding.mesh import on_mesh

E, GROUPS, K, D = 32, 8, 8, 16
TOKENS = 64


def _routes(groups_per_token: int, factor: float, once_a_node: bool) -> Routes:
    return Routes(E, GROUPS, groups_per_token, factor, once_a_node)


@pytest.mark.parametrize(
    ("nodes", "devices", "groups_per_token", "factor", "gradient"),
    [(2, 4, 4, 2.0, False), (4, 2, 2, 1.0, True), (8, 1, 4, 1.0, False)],
)
def test_compiled_bytes_between_nodes_are_those_of_the_arithmetic(nodes, devices, groups_per_token, factor, gradient):
    """Exactly: every bucket of this shape is full, so no byte is left to a tolerance but the rounding of a float."""
    mesh, layer = expert_mesh(nodes, devices), Layer(tokens=16, width=256, hidden=8, choices=K)
    counted, wanted = [], []
    for once_a_node in (False, True):
        routes = _routes(groups_per_token, factor, once_a_node)
        counted.append(compiled_traffic(layer, routes, mesh, gradient).between)
        wanted.append(bytes_between(layer, routes, mesh, gradient))
    assert counted == pytest.approx(wanted, rel=1e-12)
    # A row of 256 numbers goes with 2 * K more, so that the saving is a little less than that in rows.
    rows = K / nodes_per_token(_routes(groups_per_token, factor, True), K, nodes)
    assert rows * 256 / (256 + 2 * K) < counted[0] / counted[1] < rows


def _sent_between(monkeypatch, nodes: int, devices: int, routes: Routes, experts_NK: np.ndarray) -> int:
    """Rows that a forward pass, run, sends to other nodes and back, all its rounds together."""
    counts: list[int] = []
    ship = sharding.exchange.ship

    def note(node, send_size):
        counts.append(int(send_size.reshape(nodes, -1).sum(axis=1)[np.arange(nodes) != node].sum()))

    def counted(rows, into, shipment, axes):
        if "node" in axes and rows[0].size == D:
            jax.debug.callback(note, jax.lax.axis_index("node"), shipment.send_size)
        return ship(rows, into, shipment, axes)

    monkeypatch.setattr(sharding.exchange, "ship", counted)

    def of_device(x_ND, weights_NK, experts_NK):
        def experts(_, rows_MD, weights_M, sizes_e):
            return rows_MD * weights_M[:, None]

        return through_experts(experts, (), x_ND, weights_NK, experts_NK, routes)

    mesh = expert_mesh(nodes, devices)
    spec = PartitionSpec(mesh.axis_names)
    run = jax.jit(on_mesh(of_device, mesh, spec, spec))
    jax.block_until_ready(
        run(jnp.ones((len(experts_NK), D)), jnp.ones(experts_NK.shape), jnp.asarray(experts_NK, jnp.int32))
    )
    jax.effects_barrier()
    monkeypatch.undo()
    return sum(counts)


@pytest.mark.parametrize(("nodes", "devices"), [(4, 2), (8, 1)])
@pytest.mark.parametrize("skewed", [False, True], ids=["random", "one group for all"])
def test_a_token_crosses_no_more_often_than_it_has_groups(nodes, devices, skewed, tiny_model, monkeypatch):
    """Any number of rounds: with all tokens on the same group, its device has eight times the balanced load."""
    groups_per_token = 2
    model = tiny_model(experts=E, experts_per_token=K, expert_groups=GROUPS, groups_per_token=groups_per_token)
    scores_NE = np.random.default_rng(0).uniform(size=(TOKENS, E)) + 2 * skewed * (np.arange(E) < E // GROUPS)
    experts_NK = np.asarray(choose_experts(jnp.asarray(scores_NE), model))
    once_an_expert, once_a_node, most = rows_between(experts_NK, E, nodes)
    for wanted, once in ((once_an_expert, False), (once_a_node, True)):
        routes = _routes(groups_per_token, 1.0, once)
        assert _sent_between(monkeypatch, nodes, devices, routes, experts_NK) == 2 * round(wanted * TOKENS)
    assert once_a_node <= most <= groups_per_token and once_a_node < once_an_expert / 2
