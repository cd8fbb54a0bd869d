"""Cross entropy of a large vocabulary without the logits of all tokens in memory at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dsv3_jax.model.layers import contract
from sharding.collectives import axis_index, axis_size, largest, spread_like, summed
from sharding.rules import TENSOR_AXES

# Tokens whose logits exist at one time: 1024 rows of 129,280 logits are half a GiB.
TOKENS_AT_ONCE = 1024


def cross_entropy(hidden_ND: Array, head_DW: Array, labels_N: Array, counted_N: Array) -> Array:
    """Sum of -log softmax(hidden @ head)[label] over the counted tokens, float32 scalar, in nats.

    Args:
        hidden_ND: normed hidden states; their type is the compute type of the matmuls.
        head_DW: of the same type; where the vocabulary is divided over devices, this device's part of it.
        labels_N: int32; any id where not counted.
        counted_N: bool.

    Differentiated in reverse only. The forward pass already computes both gradients, because it has the softmax in
    hand: three products a chunk and no recomputation.
    """
    return chunked_loss(_chunk_loss, hidden_ND, head_DW, (), (labels_N, counted_N))


ChunkLoss = Callable[[Array, Array, Any, Any], tuple[Array, Array]]
"""Of a chunk's hidden states, the head, what all chunks share and the chunk's rows: the summed loss, and its gradient
in the logits [N, W]."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_loss(chunk_loss: ChunkLoss, hidden_ND: Array, head_DW: Array, shared: Any, rows: Any) -> Array:
    """The sum of `chunk_loss` over chunks of all tokens; differentiated in `hidden_ND` and `head_DW` alone.

    `rows`: a tuple of arrays [N, ..], of which a token that is padding has zeros.
    """

    def chunk(total, of_chunk):
        hidden, *rows = of_chunk
        loss, _ = chunk_loss(hidden, head_DW, shared, rows)
        return total + loss, None

    start = spread_like(jnp.zeros((), jnp.float32), hidden_ND)
    return jax.lax.scan(chunk, start, in_chunks(hidden_ND, *rows))[0]


def _forward(chunk_loss, hidden_ND, head_DW, shared, rows):
    def chunk(carry, of_chunk):
        total, head_gradient = carry
        hidden, *rows = of_chunk
        loss, logit_gradient = chunk_loss(hidden, head_DW, shared, rows)
        dtype = hidden.dtype
        hidden_gradient = contract("nw,dw->nd", logit_gradient, head_DW, dtype)
        head_gradient += contract("nd,nw->dw", hidden, logit_gradient, dtype, jnp.dtype(jnp.float32))
        return (total + loss, head_gradient), summed(hidden_gradient, TENSOR_AXES)

    start = (
        spread_like(jnp.zeros((), jnp.float32), hidden_ND),
        spread_like(jnp.zeros(head_DW.shape, jnp.float32), hidden_ND, head_DW),
    )
    (total, head_gradient), hidden_gradient = jax.lax.scan(chunk, start, in_chunks(hidden_ND, *rows))
    hidden_gradient = hidden_gradient.reshape(-1, hidden_ND.shape[1])[: hidden_ND.shape[0]]
    return total, (hidden_gradient, head_gradient.astype(head_DW.dtype))


def _backward(chunk_loss, saved, cotangent):
    of_hidden, of_head = (gradient * cotangent.astype(gradient.dtype) for gradient in saved)
    return of_hidden, of_head, None, None


chunked_loss.defvjp(_forward, _backward)


def _chunk_loss(hidden_ND: Array, head_DW: Array, _: Any, rows: Any) -> tuple[Array, Array]:
    labels_N, counted_N = rows
    logits_NW = contract("nd,dw->nw", hidden_ND, head_DW, hidden_ND.dtype, jnp.dtype(jnp.float32))
    shifted_NW = logits_NW - largest(logits_NW.max(axis=-1, keepdims=True), TENSOR_AXES)
    powers_NW = jnp.exp(shifted_NW)
    sums_N = summed(powers_NW.sum(axis=-1), TENSOR_AXES)
    column_N1 = (labels_N - axis_index(TENSOR_AXES) * head_DW.shape[1])[:, None]
    is_label_NW = column_N1 == jnp.arange(head_DW.shape[1])
    label_logits_N = label_logits(shifted_NW, column_N1)
    loss = jnp.sum(jnp.where(counted_N, jnp.log(sums_N) - label_logits_N, 0.0))
    return loss, (powers_NW * (counted_N / sums_N)[:, None]) - (is_label_NW & counted_N[:, None])


def label_logits(logits_NW: Array, column_N1: Array) -> Array:
    """Every token's logit in its column; columns count from the first of this device's part of the vocabulary."""
    logits_N = jnp.take_along_axis(logits_NW, jnp.clip(column_N1, 0, logits_NW.shape[1] - 1), axis=-1)[:, 0]
    if axis_size(TENSOR_AXES) == 1:
        return logits_N
    mine_N = ((column_N1 >= 0) & (column_N1 < logits_NW.shape[1]))[:, 0]
    return summed(jnp.where(mine_N, logits_N, 0.0), TENSOR_AXES)


def in_chunks(*arrays: Array) -> tuple[Array, ...]:
    """The tokens [N, ..] cut into equal chunks, the last padded with zeros, which do not count."""
    tokens = arrays[0].shape[0]
    count = -(-tokens // TOKENS_AT_ONCE)
    size = -(-tokens // count)
    return tuple(_cut(array, count, size) for array in arrays)


def _cut(rows: Array, count: int, size: int) -> Array:
    padding = [(0, count * size - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(count, size, *rows.shape[1:])
