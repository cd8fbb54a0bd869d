"""Tokens to their experts and back.

`dispatch` gives every (token, expert) pair a row, the rows of one expert next to each other; `combine` brings the
experts' results back to the tokens. Any routing is exact: nothing is dropped, no buffer depends on the balance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


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


def dispatch(x_ND: Array, experts_NK: Array, experts: int) -> tuple[Array, DispatchPlan]:
    """Copy each token into one row an expert it goes to, rows ordered by expert.

    Returns rows [M, D] and the plan that `combine` needs.
    """
    tokens, choices = experts_NK.shape
    flat_M = experts_NK.reshape(-1)
    choice_M = jnp.argsort(flat_M, stable=True).astype(jnp.int32)
    row_M = (
        jnp.zeros_like(choice_M).at[choice_M].set(jnp.arange(tokens * choices, dtype=jnp.int32), unique_indices=True)
    )
    group_sizes_E = jnp.sum(flat_M[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    plan = DispatchPlan(group_sizes_E, choice_M // choices, choice_M, row_M.reshape(tokens, choices))
    return _spread(x_ND, plan), plan


def combine(rows_MD: Array, weights_NK: Array, plan: DispatchPlan) -> Array:
    """Sum of each token's rows, weighted: [N, D] in the type of the rows; the sum is float32."""
    return _gather_weighted(rows_MD, weights_NK, plan)


# Both directions are gathers, because the plan holds the permutation and its inverse; differentiating the gather
# itself would give a scatter-add, several times slower and, on some backends, not reproducible.


@jax.custom_vjp
def _spread(x_ND: Array, plan: DispatchPlan) -> Array:
    return x_ND[plan.token_M]


def _spread_forward(x_ND, plan):
    return _spread(x_ND, plan), plan


def _spread_backward(plan, gradient_MD):
    gradient_ND = gradient_MD[plan.row_NK].astype(jnp.float32).sum(axis=1).astype(gradient_MD.dtype)
    return gradient_ND, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _gather_weighted(rows_MD: Array, weights_NK: Array, plan: DispatchPlan) -> Array:
    return jnp.einsum("nkd,nk->nd", rows_MD[plan.row_NK].astype(jnp.float32), weights_NK).astype(rows_MD.dtype)


def _gather_weighted_forward(rows_MD, weights_NK, plan):
    return _gather_weighted(rows_MD, weights_NK, plan), (rows_MD, weights_NK, plan)


def _gather_weighted_backward(saved, gradient_ND):
    rows_MD, weights_NK, plan = saved
    gradient_MD = gradient_ND[plan.token_M].astype(jnp.float32)
    gradient_weight_M = jnp.sum(gradient_MD * rows_MD.astype(jnp.float32), axis=-1)
    gradient_rows_MD = gradient_MD * weights_NK.reshape(-1)[plan.choice_M][:, None]
    return gradient_rows_MD.astype(rows_MD.dtype), gradient_weight_M[plan.row_NK].astype(weights_NK.dtype), None


_gather_weighted.defvjp(_gather_weighted_forward, _gather_weighted_backward)
