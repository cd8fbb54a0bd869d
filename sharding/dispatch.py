"""Tokens to their experts and back.

`dispatch` gives every (token, expert) pair a row, the rows of one expert next to each other; `combine` brings the
experts' results back to the tokens. Where experts are divided over a mesh, `exchange.py` takes the rows to their
devices in between. Any routing is exact: nothing is dropped, no buffer depends on the balance.

A row's weight goes along with it, for the experts to apply: weighed in `combine`, what every expert answered would have
to be kept, or computed again, for the gradient of the weights.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import axis_size, present
from sharding.exchange import Answer, exchanged
from sharding.rules import EXPERT_AXES


class DispatchPlan(NamedTuple):
    """Where each row came from. M = N * K rows."""

    group_sizes_E: Array
    """int32, rows of each expert; its rows follow those of the experts before it."""
    token_M: Array
    """int32, token of each row."""
    choice_M: Array
    """int32, which (token, choice) pair each row is, as token * K + choice."""
    row_NK: Array
    """int32, row of each (token, choice)."""


def through_experts(
    answer: Answer, matrices: Any, x_ND: Array, weights_NK: Array, experts_NK: Array, experts: int, factor: float
) -> Array:
    """Each token's sum of its experts' answers: [N, D].

    Args:
        answer: (matrices, rows, weights, group sizes) -> answers, the experts of one device.
        matrices: what those experts multiply with; of E experts, those of this device.
        x_ND: this device's tokens.
        weights_NK: float32, what each answer is multiplied by.
        experts_NK: int32 in [0, E).
        experts: E.
        factor: rows that a device receives at one time, as a multiple of what balanced routing would send it.
    """
    rows_MD, weights_M, plan = dispatch(x_ND, weights_NK, experts_NK, experts)
    if axes := present(EXPERT_AXES):
        most = rows_MD.shape[0] * axis_size(axes)
        capacity = min(math.ceil(rows_MD.shape[0] * factor), most)
        answers_MD = exchanged(answer, axes, capacity, matrices, rows_MD, weights_M, plan.group_sizes_E)
    else:
        answers_MD = answer(matrices, rows_MD, weights_M, plan.group_sizes_E)
    return combine(answers_MD, plan)


def dispatch(x_ND: Array, weights_NK: Array, experts_NK: Array, experts: int) -> tuple[Array, Array, DispatchPlan]:
    """Copy each token into one row an expert it goes to, rows ordered by expert.

    Returns rows [M, D], the weight of each row [M], and the plan that `combine` needs.
    """
    tokens, choices = experts_NK.shape
    flat_M = experts_NK.reshape(-1)
    choice_M = jnp.argsort(flat_M, stable=True).astype(jnp.int32)
    row_M = (
        jnp.zeros_like(choice_M).at[choice_M].set(jnp.arange(tokens * choices, dtype=jnp.int32), unique_indices=True)
    )
    group_sizes_E = jnp.sum(flat_M[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    plan = DispatchPlan(group_sizes_E, choice_M // choices, choice_M, row_M.reshape(tokens, choices))
    return _spread(x_ND, plan), _permute(weights_NK, plan), plan


def combine(rows_MD: Array, plan: DispatchPlan) -> Array:
    """Sum of each token's rows: [N, D] in the type of the rows; the sum is float32."""
    return _gather(rows_MD, plan)


# All three are gathers, because the plan holds the permutation and its inverse; `_spread` and `_gather` are each
# other's transpose. Differentiating a gather itself would give a scatter-add, several times slower and not
# reproducible on every backend.


@jax.custom_vjp
def _spread(x_ND: Array, plan: DispatchPlan) -> Array:
    return x_ND[plan.token_M]


@jax.custom_vjp
def _gather(rows_MD: Array, plan: DispatchPlan) -> Array:
    return rows_MD[plan.row_NK].astype(jnp.float32).sum(axis=1).astype(rows_MD.dtype)


@jax.custom_vjp
def _permute(weights_NK: Array, plan: DispatchPlan) -> Array:
    return weights_NK.reshape(-1)[plan.choice_M]


def _unpermute(weights_M: Array, plan: DispatchPlan) -> Array:
    return weights_M[plan.row_NK]


def _with_transpose(function: jax.custom_vjp, transpose: Callable[[Array, DispatchPlan], Array]) -> None:
    function.defvjp(
        lambda values, plan: (function(values, plan), plan), lambda plan, gradient: (transpose(gradient, plan), None)
    )


_with_transpose(_spread, _gather)
_with_transpose(_gather, _spread)
_with_transpose(_permute, _unpermute)
