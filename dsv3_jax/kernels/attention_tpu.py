"""Causal attention on TPUs, in Pallas: no logits in memory, and no block above the diagonal computed or fetched.

A running softmax over blocks of keys, and its gradient written out, as in FlashAttention (arXiv 2205.14135). What of a
query is one number lies along lanes: [B, H, 1, S], because as [B, H, S, 1] each would take LANES numbers in memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from dsv3_jax.kernels.attention_grid_tpu import LANES, Blocked, across, as_column, block_of, over_visible_blocks

# Finite: of a row that has seen only other segments' keys yet, the softmax is that of equal logits, and is multiplied
# with 0 as soon as the row sees itself.
UNSEEN = -1e30


def forward(
    query_BHSd: Array,
    key_BHSd: Array,
    value_BHSV: Array,
    segment_ids_BS: Array | None,
    scale: float,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """As that of attention_blocks.py. `interpret`: emulated, for tests on a CPU."""
    (sequence, depth), width = query_BHSd.shape[2:], value_BHSV.shape[3]
    query, key, value = (_padded(x) for x in (query_BHSd, key_BHSd, value_BHSV))
    block, lines = block_of(query), jax.ShapeDtypeStruct((*query.shape[:2], 1, query.shape[2]), jnp.float32)
    out_BHSV, log_sum_BH1S = over_visible_blocks(
        functools.partial(_forward_kernel, scale=scale),
        [Blocked(query), Blocked(key, of_keys=True), Blocked(value, of_keys=True)],
        [Blocked(value), Blocked(lines)],
        segment_ids_BS,
        block,
        by_key=False,
        scratch=[(block, LANES), (block, LANES), (block, value.shape[3])],
        cost=_cost([query_BHSd, key_BHSd, value_BHSV, value_BHSV], depth + width),
        interpret=interpret,
        name="causal_attention",
    )
    return out_BHSV[:, :, :sequence, :width], log_sum_BH1S[:, :, 0, :sequence]


def backward(
    query_BHSd: Array,
    key_BHSd: Array,
    value_BHSV: Array,
    segment_ids_BS: Array | None,
    output_BHSV: Array,
    log_sum_BHS: Array,
    gradient_BHSV: Array,
    scale: float,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    (sequence, depth), width = query_BHSd.shape[2:], value_BHSV.shape[3]
    # A softmax takes from each weight's gradient their mean, which needs no weights: sum_t w_t (g . v_t) = g . output.
    mean_BHS = jnp.sum(gradient_BHSV.astype(jnp.float32) * output_BHSV, axis=-1)
    query, key, value, gradient = (_padded(x) for x in (query_BHSd, key_BHSd, value_BHSV, gradient_BHSV))
    to_blocks = [(0, 0), (0, 0), (0, query.shape[2] - sequence)]
    log_sum, mean = (jnp.pad(x, to_blocks)[:, :, None] for x in (log_sum_BHS, mean_BHS))
    block, moved = block_of(query), [query_BHSd, query_BHSd, key_BHSd, value_BHSV, gradient_BHSV]
    of_all = functools.partial(
        over_visible_blocks,
        inputs=[Blocked(query), Blocked(key, True), Blocked(value, True), *map(Blocked, (gradient, log_sum, mean))],
        segment_ids_BS=segment_ids_BS,
        block=block,
        interpret=interpret,
    )
    (of_query,) = of_all(
        functools.partial(_gradient_of_queries_kernel, scale=scale),
        outputs=[Blocked(query)],
        by_key=False,
        scratch=[(block, query.shape[3]), (block, LANES), (block, LANES)],
        cost=_cost(moved, 2 * depth + width),
        name="causal_attention_gradient_of_queries",
    )
    of_key, of_value = of_all(
        functools.partial(_gradient_of_keys_kernel, scale=scale),
        outputs=[Blocked(key, True), Blocked(value, True)],
        by_key=True,
        scratch=[(block, key.shape[3]), (block, value.shape[3])],
        cost=_cost([*moved, value_BHSV], 2 * depth + 2 * width),
        name="causal_attention_gradient_of_keys",
    )
    cut = ((of_query, depth), (of_key, depth), (of_value, width))
    of_query, of_key, of_value = (x[:, :, :sequence, :dim] for x, dim in cut)
    return of_query, of_key, of_value


def _forward_kernel(at, query, key, value, out, log_sum, largest, total, mixed, *, scale):
    @pl.when(at.first)
    def _():
        largest[...] = jnp.full_like(largest, UNSEEN)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    def add(queries, keys, hidden):
        logits = hidden(_dot(query[queries, :], key[keys, :], 1, 1) * scale, UNSEEN)
        before = largest[queries, :]
        now = jnp.maximum(before, logits.max(axis=1, keepdims=True))
        weights, old = jnp.exp(logits - across(now, logits.shape[1])), jnp.exp(before - now)
        largest[queries, :] = now
        total[queries, :] = total[queries, :] * old + weights.sum(axis=1, keepdims=True)
        part = _dot(weights.astype(value.dtype), value[keys, :], 1, 0)
        mixed[queries, :] = mixed[queries, :] * across(old, part.shape[1]) + part

    at.each_piece(add)

    @pl.when(at.diagonal)
    def _():
        out[...] = (mixed[...] / across(total[...], mixed.shape[1])).astype(out.dtype)
        log_sum[...] = (largest[...] + jnp.log(total[...])).T[:1]


def _gradient_of_queries_kernel(
    at, query, key, value, gradient, log_sum, mean, of_query, total, log_sums, means, *, scale
):
    @pl.when(at.first)
    def _():
        total[...] = jnp.zeros_like(total)
        log_sums[...], means[...] = as_column(log_sum[...]), as_column(mean[...])

    def add(queries, keys, hidden):
        logits = _dot(query[queries, :], key[keys, :], 1, 1) * scale
        weights = hidden(jnp.exp(logits - across(log_sums[queries, :], logits.shape[1])), 0.0)
        of_weights = _dot(gradient[queries, :], value[keys, :], 1, 1)
        of_logits = weights * (of_weights - across(means[queries, :], logits.shape[1])) * scale
        total[queries, :] += _dot(of_logits.astype(key.dtype), key[keys, :], 1, 0)

    at.each_piece(add)

    @pl.when(at.diagonal)
    def _():
        of_query[...] = total[...].astype(of_query.dtype)


def _gradient_of_keys_kernel(
    at, query, key, value, gradient, log_sum, mean, of_key, of_value, total_key, total_value, *, scale
):
    """With logits [keys, queries]: that is how the products need them, and how a query's numbers lie along lanes."""

    @pl.when(at.first)
    def _():
        total_key[...], total_value[...] = jnp.zeros_like(total_key), jnp.zeros_like(total_value)

    def add(queries, keys, hidden):
        logits = _dot(key[keys, :], query[queries, :], 1, 1) * scale
        weights = hidden(jnp.exp(logits - log_sum[:, queries]), 0.0)
        total_value[keys, :] += _dot(weights.astype(value.dtype), gradient[queries, :], 1, 0)
        of_weights = _dot(value[keys, :], gradient[queries, :], 1, 1)
        of_logits = weights * (of_weights - mean[:, queries]) * scale
        total_key[keys, :] += _dot(of_logits.astype(key.dtype), query[queries, :], 1, 0)

    at.each_piece(add)

    @pl.when(at.diagonal)
    def _():
        of_key[...], of_value[...] = total_key[...].astype(of_key.dtype), total_value[...].astype(of_value.dtype)


def _dot(left, right, of_left, of_right):
    """Product over one dim of each, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((of_left,), (of_right,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)


def _padded(x_BHSd: Array) -> Array:
    """With zeros: rows to whole blocks; head dims to whole registers, or to one and a half, which V3's keys have."""
    sequence, width = x_BHSd.shape[2:]
    to_width = 0 if width == LANES * 3 // 2 else -width % LANES
    return jnp.pad(x_BHSd, [(0, 0), (0, 0), (0, -sequence % block_of(x_BHSd)), (0, to_width)])


def _cost(moved: list[Array], dims: int) -> pl.CostEstimate:
    """Of the pairs of a query and a key it sees. `dims`: summed over the products, the head dim each is of."""
    batch, heads, sequence, _ = moved[0].shape
    pairs = batch * heads * sequence * (sequence + 1) // 2
    return pl.CostEstimate(flops=2 * pairs * dims, transcendentals=pairs, bytes_accessed=sum(x.nbytes for x in moved))
