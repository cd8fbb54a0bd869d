"""Log probabilities of given tokens, at a temperature, without the logits of all positions in memory at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv3_jax.model.layers import contract
from dsv3_jax.training.cross_entropy import in_chunks, label_logits
from sharding.collectives import axis_index, largest, summed
from sharding.rules import TENSOR_AXES


class TokenLogprobs(NamedTuple):
    """float32 [N], in nats."""

    logprobs_N: Array
    """Of each label."""
    entropies_N: Array
    """Of the distribution it is from; without gradient."""


def token_logprobs(
    hidden_ND: Array, head_DW: Array, labels_N: Array, temperature: float, known_W: Array
) -> TokenLogprobs:
    """log softmax(hidden @ head / temperature)[label], over the known ids alone: what a sampler draws from.

    Args:
        hidden_ND: normed hidden states; their type is the compute type of the matmuls.
        head_DW: of the same type; where the vocabulary is divided over devices, this device's part of it.
        labels_N: int32; the result means nothing where an id is not known.
        temperature: above 0.
        known_W: bool, of the whole vocabulary.

    Backward computes the logits again, chunk by chunk: which gradient they get is known only then.
    """
    words = head_DW.shape[1]
    known_w = jax.lax.dynamic_slice_in_dim(known_W, axis_index(TENSOR_AXES) * words, words)

    def of_chunk(rows: tuple[Array, Array]) -> TokenLogprobs:
        hidden, labels_N = rows
        logits_NW = contract("nd,dw->nw", hidden, head_DW, hidden.dtype, jnp.dtype(jnp.float32)) / temperature
        logits_NW = jnp.where(known_w, logits_NW, -jnp.inf)
        highest_N1 = jax.lax.stop_gradient(logits_NW).max(axis=-1, keepdims=True)
        shifted_NW = logits_NW - largest(highest_N1, TENSOR_AXES)
        powers_NW = jnp.exp(shifted_NW)
        sums_N = summed(powers_NW.sum(axis=-1), TENSOR_AXES)
        column_N1 = (labels_N - axis_index(TENSOR_AXES) * words)[:, None]
        logprobs_N = label_logits(shifted_NW, column_N1) - jnp.log(sums_N)
        # An id that is not known has no probability, and 0 * -inf is NaN.
        spread_N = jnp.where(known_w, powers_NW * shifted_NW, 0.0).sum(axis=-1)
        entropies_N = jnp.log(sums_N) - summed(spread_N, TENSOR_AXES) / sums_N
        return TokenLogprobs(logprobs_N, jax.lax.stop_gradient(entropies_N))

    chunks = in_chunks(hidden_ND, labels_N)
    of_chunks = jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), chunks)
    return TokenLogprobs(*(each.reshape(-1)[: hidden_ND.shape[0]] for each in of_chunks))
