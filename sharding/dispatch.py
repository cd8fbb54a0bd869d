"""Tokens to their experts and back, wherever on the mesh those are.

Any routing is exact: nothing is dropped, no buffer depends on the balance. `token_rows.py` makes rows of tokens and
sums their answers, `exchange.py` takes rows to other devices and answers back.

A row's weight goes along with it, for the experts to apply: weighed when the answers are summed, what every expert
answered would have to be kept, or computed again, for the gradient of the weights.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import axis_size, largest, present, variation
from sharding.encoded import Encoded, values_of, with_values, without_values
from sharding.exchange import Wire, exchanged
from sharding.repetition import added_up
from sharding.rules import EXPERT_AXES
from sharding.token_rows import (
    DispatchPlan,
    combine,
    dispatch,
    partial_plan,
    rows_of_tokens,
    spread_rows,
    spread_weights,
)

# (matrices, rows [M, D] or Encoded, weights [M], group sizes [e]) -> answers [M, D], each times its weight.
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
    wire: Wire | None = None
    """How the gradients of answers travel to the experts; None: as they are."""


def through_experts(
    experts: Experts, matrices: Any, x_ND: Array | Encoded, weights_NK: Array, experts_NK: Array, routes: Routes
) -> Array:
    """Each token's sum of its experts' answers: [N, D].

    Args:
        experts: those of one device, as a function.
        matrices: what they multiply with, this device's part of all E.
        x_ND: this device's tokens. Encoded ones travel as they are encoded, an array [N, ..], and reach the experts so;
            what comes back is always numbers.
        weights_NK: float32, what each answer is multiplied by.
        experts_NK: int32 in [0, E).
    """
    if not present(EXPERT_AXES):
        rows_MD, weights_M, plan = dispatch(x_ND, weights_NK, experts_NK, routes.experts)
        return combine(experts(matrices, rows_MD, weights_M, plan.group_sizes_E), plan)

    def of_folded(matrices: Any, rows: Any, weights_M: Array, group_sizes_e: Array) -> Array:
        return _folded(experts(matrices, jax.tree.map(_unfolded, rows), weights_M, group_sizes_e))

    if wire := routes.wire:
        encode, decode = (_of_folded(function) for function in wire)
        routes = routes._replace(wire=Wire(encode, decode))
    through = _through_nodes if routes.once_a_node and present(("node",)) else _through_devices
    return _unfolded(through(of_folded, matrices, jax.tree.map(_folded, x_ND), weights_NK, experts_NK, routes))


# A TPU keeps the rows of a matrix eight by eight, woven together. A row that is a matrix itself lies in one piece: sent
# as it is, where otherwise everything sent and received would be laid out anew.
LANES = 128


def _folded(rows_MD: Array) -> Array:
    """[M, D / LANES, LANES], of a D that has whole ones."""
    return rows_MD.reshape(rows_MD.shape[0], -1, LANES if rows_MD.shape[1] % LANES == 0 else rows_MD.shape[1])


def _unfolded(rows: Array) -> Array:
    return rows.reshape(rows.shape[0], -1)


def _of_folded(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda rows: _folded(function(_unfolded(rows)))


def _through_devices(
    experts: Experts, matrices: Any, rows: Any, weights_NK: Array, experts_NK: Array, routes: Routes
) -> Array:
    rows, weights_M, plan = dispatch(rows, weights_NK, experts_NK, routes.experts)
    return combine(_answers(experts, matrices, rows, weights_M, plan, EXPERT_AXES, len(weights_M), routes), plan)


def _answers(
    experts: Experts,
    matrices: Any,
    rows_MD: Any,
    weights_M: Array,
    plan: DispatchPlan,
    over: tuple[str, ...],
    balanced: int,
    routes: Routes,
) -> Array:
    """The experts' answer to each row, the experts divided over these axes; `balanced` rows come to each device."""

    def answer(matrices: Any, rows: Any, weights: Array, _: None, sizes: Array) -> Array:
        return experts(matrices, rows, weights, sizes)

    axes = present(over)
    if not axes:
        return experts(matrices, rows_MD, weights_M, plan.group_sizes_E)
    capacity = min(math.ceil(routes.factor * balanced), len(weights_M) * axis_size(axes))
    return exchanged(answer, axes, capacity, matrices, rows_MD, weights_M, None, plan.group_sizes_E, routes.wire)


# Two levels. Routing is limited to a few groups of experts, each on one node, so that a token has to cross the slow
# links between nodes only that often (V3 section 3.2.2): first to the device with its own place in each of those nodes,
# then within the node to its experts; their answers are summed on the way back, before they cross again.


def _through_nodes(
    experts: Experts, matrices: Any, x_ND: Any, weights_NK: Array, experts_NK: Array, routes: Routes
) -> Array:
    (tokens, choices), nodes = experts_NK.shape, axis_size(("node",))
    node_NK, expert_NK = jnp.divmod(experts_NK, routes.experts // nodes)
    goes_NT = (node_NK[:, :, None] == jnp.arange(nodes)).any(axis=1)
    crossings = tokens * nodes_per_token(routes, choices, nodes)
    plan = partial_plan(jnp.where(goes_NT, jnp.arange(nodes), -1), nodes, crossings, 0)
    rows_MD, weights_MK = rows_of_tokens(x_ND, plan), spread_rows(weights_NK, plan)
    node_M = plan.choice_M % nodes
    expert_MK = jnp.where(node_NK[plan.token_M] == node_M[:, None], expert_NK[plan.token_M], -1)

    def of_node(matrices: Any, rows_RD: Any, weights_RK: Array, expert_RK: Array, sizes: Array) -> Array:
        expert_RK = jnp.where((jnp.arange(len(expert_RK)) < sizes.sum())[:, None], expert_RK, -1)
        return _within_node(experts, matrices, rows_RD, weights_RK, expert_RK, tokens * choices, routes, nodes)

    capacity = min(math.ceil(routes.factor * crossings), nodes * crossings)
    sizes = plan.group_sizes_E
    answers_MD = exchanged(of_node, ("node",), capacity, matrices, rows_MD, weights_MK, expert_MK, sizes, routes.wire)
    return combine(answers_MD, plan)


def nodes_per_token(routes: Routes, choices: int, nodes: int) -> int:
    """The most nodes a token has experts on."""
    most = min(nodes, choices)
    return min(most, routes.groups_per_token) if routes.groups % nodes == 0 else most


def _within_node(
    experts: Experts,
    matrices: Any,
    rows_RD: Any,
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
    arguments = matrices, rows_RD

    def part(index: Array, values: Any, constants: Any) -> Array:
        (of_arguments, weights_RK), (rest, expert_RK) = values, constants
        matrices, rows_RD = with_values(rest, of_arguments)
        plan = partial_plan(expert_RK, routes.experts // nodes, pairs, index)
        rows_MD, weights_M = rows_of_tokens(rows_RD, plan), spread_weights(weights_RK, plan)
        return combine(_answers(experts, matrices, rows_MD, weights_M, plan, ("expert",), balanced, routes), plan)

    parts = -(-jnp.sum(expert_RK >= 0) // pairs)
    values, constants = (values_of(arguments), weights_RK), (without_values(arguments), expert_RK)
    return added_up(part, largest(parts, variation(parts)), values, constants)
