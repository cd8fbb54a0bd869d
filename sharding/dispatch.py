"""Tokens to their experts and back, wherever on the mesh those are.

Any routing is exact: nothing is dropped, no buffer depends on the balance. `token_rows.py` makes rows of tokens and
sums their answers, `exchange.py` takes rows to other devices and answers back.

A row's weight goes along with it, for the experts to apply: weighed when the answers are summed, what every expert
answered would have to be kept, or computed again, for the gradient of the weights.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from sharding.collectives import axis_size, largest, present, variation
from sharding.exchange import exchanged
from sharding.repetition import added_up
from sharding.rules import EXPERT_AXES
from sharding.token_rows import DispatchPlan, combine, dispatch, partial_plan, spread_rows, spread_weights

# (matrices, rows [M, D], weights [M], group sizes [e]) -> answers [M, D], each times its weight.
Experts = Callable[[Any, Array, Array, Array], Array]


class Routes(NamedTuple):
    """What is known of every routing before it is made."""

    experts: int
    """E, on all devices together."""
    groups: int
    """Groups of consecutive experts."""
    groups_per_token: int
    """From how many of them a token chooses."""
    factor: float
    """Rows that a device takes in at one time, as a multiple of what balanced routing would send it."""
    once_a_node: bool
    """Send a token once to each node it has experts on, and there on to its experts; otherwise once to each expert."""


def through_experts(
    experts: Experts, matrices: Any, x_ND: Array, weights_NK: Array, experts_NK: Array, routes: Routes
) -> Array:
    """Each token's sum of its experts' answers: [N, D].

    Args:
        experts: those of one device, as a function.
        matrices: what they multiply with, this device's part of all E.
        x_ND: this device's tokens.
        weights_NK: float32, what each answer is multiplied by.
        experts_NK: int32 in [0, E).
    """
    if not present(EXPERT_AXES):
        rows_MD, weights_M, plan = dispatch(x_ND, weights_NK, experts_NK, routes.experts)
        return combine(experts(matrices, rows_MD, weights_M, plan.group_sizes_E), plan)

    def of_folded(matrices: Any, rows: Array, weights_M: Array, group_sizes_e: Array) -> Array:
        return _folded(experts(matrices, _unfolded(rows), weights_M, group_sizes_e))

    through = _through_nodes if routes.once_a_node and present(("node",)) else _through_devices
    return _unfolded(through(of_folded, matrices, _folded(x_ND), weights_NK, experts_NK, routes))


# A TPU keeps the rows of a matrix eight by eight, woven together. A row that is a matrix itself lies in one piece: sent
# as it is, where otherwise everything sent and received would be laid out anew.
LANES = 128


def _folded(rows_MD: Array) -> Array:
    """[M, D / LANES, LANES], of a D that has whole ones."""
    return rows_MD.reshape(rows_MD.shape[0], -1, LANES if rows_MD.shape[1] % LANES == 0 else rows_MD.shape[1])


def _unfolded(rows: Array) -> Array:
    return rows.reshape(rows.shape[0], -1)


def _through_devices(
    experts: Experts, matrices: Any, rows: Array, weights_NK: Array, experts_NK: Array, routes: Routes
) -> Array:
    rows, weights_M, plan = dispatch(rows, weights_NK, experts_NK, routes.experts)
    return combine(_answers(experts, matrices, rows, weights_M, plan, EXPERT_AXES, rows.shape[0], routes), plan)


def _answers(
    experts: Experts,
    matrices: Any,
    rows_MD: Array,
    weights_M: Array,
    plan: DispatchPlan,
    over: tuple[str, ...],
    balanced: int,
    routes: Routes,
) -> Array:
    """The experts' answer to each row, the experts divided over these axes; `balanced` rows come to each device."""

    def answer(matrices: Any, rows: Array, weights: Array, _: None, sizes: Array) -> Array:
        return experts(matrices, rows, weights, sizes)

    axes = present(over)
    if not axes:
        return experts(matrices, rows_MD, weights_M, plan.group_sizes_E)
    capacity = min(math.ceil(routes.factor * balanced), rows_MD.shape[0] * axis_size(axes))
    return exchanged(answer, axes, capacity, matrices, rows_MD, weights_M, None, plan.group_sizes_E)


# Two levels. Routing is limited to a few groups of experts, each on one node, so that a token has to cross the slow
# links between nodes only that often (V3 section 3.2.2): first to the device with its own place in each of those nodes,
# then within the node to its experts; their answers are summed on the way back, before they cross again.


def _through_nodes(
    experts: Experts, matrices: Any, x_ND: Array, weights_NK: Array, experts_NK: Array, routes: Routes
) -> Array:
    (tokens, choices), nodes = experts_NK.shape, axis_size(("node",))
    node_NK, expert_NK = jnp.divmod(experts_NK, routes.experts // nodes)
    goes_NT = (node_NK[:, :, None] == jnp.arange(nodes)).any(axis=1)
    crossings = tokens * nodes_per_token(routes, choices, nodes)
    plan = partial_plan(jnp.where(goes_NT, jnp.arange(nodes), -1), nodes, crossings, 0)
    rows_MD, weights_MK = spread_rows(x_ND, plan), spread_rows(weights_NK, plan)
    node_M = plan.choice_M % nodes
    expert_MK = jnp.where(node_NK[plan.token_M] == node_M[:, None], expert_NK[plan.token_M], -1)

    def of_node(matrices: Any, rows_RD: Array, weights_RK: Array, expert_RK: Array, sizes: Array) -> Array:
        expert_RK = jnp.where((jnp.arange(len(expert_RK)) < sizes.sum())[:, None], expert_RK, -1)
        return _within_node(experts, matrices, rows_RD, weights_RK, expert_RK, tokens * choices, routes, nodes)

    capacity = min(math.ceil(routes.factor * crossings), nodes * crossings)
    answers_MD = exchanged(of_node, ("node",), capacity, matrices, rows_MD, weights_MK, expert_MK, plan.group_sizes_E)
    return combine(answers_MD, plan)


def nodes_per_token(routes: Routes, choices: int, nodes: int) -> int:
    """The most nodes a token has experts on."""
    most = min(nodes, choices)
    return min(most, routes.groups_per_token) if routes.groups % nodes == 0 else most


def _within_node(
    experts: Experts,
    matrices: Any,
    rows_RD: Array,
    weights_RK: Array,
    expert_RK: Array,
    balanced: int,
    routes: Routes,
    nodes: int,
) -> Array:
    """Each row's sum of its experts' answers, experts of this node's devices; -1 is no expert.

    What came over the slow links is dealt with in as many parts as it has `factor * balanced` pairs.
    """
    pairs = min(math.ceil(routes.factor * balanced), expert_RK.size)

    def part(index: Array, values: Any, expert_RK: Array) -> Array:
        matrices, rows_RD, weights_RK = values
        plan = partial_plan(expert_RK, routes.experts // nodes, pairs, index)
        rows_MD, weights_M = spread_rows(rows_RD, plan), spread_weights(weights_RK, plan)
        return combine(_answers(experts, matrices, rows_MD, weights_M, plan, ("expert",), balanced, routes), plan)

    parts = -(-jnp.sum(expert_RK >= 0) // pairs)
    return added_up(part, largest(parts, variation(parts)), (matrices, rows_RD, weights_RK), expert_RK)
