"""Tokens to their experts and back.

`dispatch` gives every (token, expert) pair a row, the rows of one expert next to each other; `combine` brings the
experts' results back to the tokens. Any routing is exact: nothing is dropped, no buffer depends on the balance.

A row's weight goes along with it, for the experts to apply: weighed in `combine`, what every expert answered would have
to be kept, or computed again, for the gradient of the weights.
"""

from collections.abc import Callable
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
