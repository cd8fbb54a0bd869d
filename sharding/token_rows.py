"""Rows of tokens, grouped by expert, and the sums of their answers.

`dispatch` gives every (token, expert) pair a row, the rows of one expert next to each other; `combine` sums what the
experts answer to each token's rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import spread_like


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


class PartialPlan(DispatchPlan):
    """Of some of the pairs: the others have row M, and rows past the sum of the group sizes are no rows."""


def dispatch(x_ND: Any, weights_NK: Array, experts_NK: Array, experts: int) -> tuple[Any, Array, DispatchPlan]:
    """Copy each token into one row an expert it goes to, rows ordered by expert.

    x_ND is an array or a tree of arrays. Returns rows [M, D], the weight of each row [M], and the plan that `combine`
    needs.
    """
    tokens, choices = experts_NK.shape
    flat_M = experts_NK.reshape(-1)
    choice_M = jnp.argsort(flat_M, stable=True).astype(jnp.int32)
    row_M = (
        jnp.zeros_like(choice_M).at[choice_M].set(jnp.arange(tokens * choices, dtype=jnp.int32), unique_indices=True)
    )
    group_sizes_E = jnp.sum(flat_M[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    plan = DispatchPlan(group_sizes_E, choice_M // choices, choice_M, row_M.reshape(tokens, choices))
    return rows_of_tokens(x_ND, plan), spread_weights(weights_NK, plan), plan


def rows_of_tokens(x_ND: Any, plan: DispatchPlan) -> Any:
    """`spread_rows` of every array."""
    return jax.tree.map(lambda tokens: spread_rows(tokens, plan), x_ND)


def partial_plan(groups_NK: Array, groups: int, rows: int, part: Array | int) -> PartialPlan:
    """A plan for one part of the pairs that have a group: `rows` of them at a time, in the order of tokens.

    groups_NK: int32 in [0, groups), -1 for no pair.
    """
    flat = groups_NK.reshape(-1)
    number = jnp.cumsum(flat >= 0) - 1
    chosen = (flat >= 0) & (number // rows == part)
    order = jnp.argsort(jnp.where(chosen, flat, groups), stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    group_sizes = jnp.sum((flat[:, None] == jnp.arange(groups)) & chosen[:, None], axis=0, dtype=jnp.int32)
    choice_M = order[:rows]
    row_NK = jnp.where(chosen, place, rows).reshape(groups_NK.shape)
    return PartialPlan(group_sizes, choice_M // groups_NK.shape[1], choice_M, row_NK)


# These are gathers, both ways, because a plan holds the permutation and its inverse. Differentiating a gather itself
# would give a scatter-add, several times slower and not reproducible on every backend.


@jax.custom_vjp
def spread_rows(x_ND: Array, plan: DispatchPlan) -> Array:
    """Each row's token: [M, D]. Its transpose is `combine`."""
    return x_ND[plan.token_M]


@jax.custom_vjp
def combine(rows_MD: Array, plan: DispatchPlan) -> Array:
    """Sum of each token's rows: [N, D] in the type of the rows; the sum is float32. Its transpose is `spread_rows`."""
    if not isinstance(plan, PartialPlan):
        return rows_MD[plan.row_NK].astype(jnp.float32).sum(axis=1).astype(rows_MD.dtype)
    # Choice by choice: there may be many more pairs than rows.
    total_ND = spread_like(jnp.zeros((len(plan.row_NK), *rows_MD.shape[1:]), jnp.float32), rows_MD, plan.row_NK)

    def add(total_ND: Array, row_N: Array) -> tuple[Array, None]:
        return total_ND + _rows_or_zero(rows_MD, row_N), None

    return jax.lax.scan(add, total_ND, plan.row_NK.T)[0].astype(rows_MD.dtype)


@jax.custom_vjp
def spread_weights(weights_NK: Array, plan: DispatchPlan) -> Array:
    """Each row's weight: [M]."""
    return weights_NK.reshape(-1)[plan.choice_M]


def _weights_of_pairs(weights_M: Array, plan: DispatchPlan) -> Array:
    return _rows_or_zero(weights_M, plan.row_NK) if isinstance(plan, PartialPlan) else weights_M[plan.row_NK]


def _rows_or_zero(rows: Array, index: Array) -> Array:
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _with_transpose(function: jax.custom_vjp, transpose: Callable[[Array, DispatchPlan], Array]) -> None:
    function.defvjp(
        lambda values, plan: (function(values, plan), plan), lambda plan, gradient: (transpose(gradient, plan), None)
    )


_with_transpose(spread_rows, combine)
_with_transpose(combine, spread_rows)
_with_transpose(spread_weights, _weights_of_pairs)
