"""Causal attention in jax.numpy, for every platform that has no kernel of its own."""

import jax
import jax.numpy as jnp
from jax import Array

# Query rows are taken in at most this many blocks, each against no more keys than causality allows: up to half of the
# products and of the softmax are never computed. The count is bounded because the blocks are unrolled.
QUERY_BLOCKS = 8
SMALLEST_QUERY_BLOCK = 128


def forward(
    query_BHSd: Array, key_BHSd: Array, value_BHSV: Array, segment_ids_BS: Array | None, scale: float
) -> tuple[Array, Array]:
    """The output [B, H, S, V], and the logarithm of each query's softmax's denominator, float32 [B, H, S]."""
    outputs, log_sums = [], []
    for start, stop in _query_blocks(query_BHSd.shape[2]):
        query, key, value = query_BHSd[:, :, start:stop], key_BHSd[:, :, :stop], value_BHSV[:, :, :stop]
        logits_BHST = product("bhsd,bhtd->bhst", query, key, jnp.float32) * scale
        logits_BHST = jnp.where(_visible(start, stop, segment_ids_BS), logits_BHST, -jnp.inf)
        largest_BHS1 = logits_BHST.max(axis=-1, keepdims=True)
        weights_BHST = jnp.exp(logits_BHST - largest_BHS1)
        sum_BHS1 = weights_BHST.sum(axis=-1, keepdims=True)
        mixed_BHSV = product("bhst,bhtv->bhsv", weights_BHST.astype(value.dtype), value, jnp.float32)
        outputs.append((mixed_BHSV / sum_BHS1).astype(value.dtype))
        log_sums.append(largest_BHS1 + jnp.log(sum_BHS1))
    output_BHSV, log_sum_BHS1 = (jnp.concatenate(blocks, axis=2) for blocks in (outputs, log_sums))
    return output_BHSV, log_sum_BHS1[..., 0]


def backward(
    query_BHSd: Array,
    key_BHSd: Array,
    value_BHSV: Array,
    segment_ids_BS: Array | None,
    output_BHSV: Array,
    log_sum_BHS: Array,
    gradient_BHSV: Array,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values, from the arguments and results of `forward`."""
    # A softmax takes from each weight's gradient their mean, which needs no weights: sum_t w_t (g . v_t) = g . output.
    mean_BHS1 = jnp.sum(gradient_BHSV.astype(jnp.float32) * output_BHSV, axis=-1, keepdims=True)
    log_sum_BHS1, of_query, of_key, of_value = log_sum_BHS[..., None], [], [], []
    for start, stop in _query_blocks(query_BHSd.shape[2]):
        query, key, value = query_BHSd[:, :, start:stop], key_BHSd[:, :, :stop], value_BHSV[:, :, :stop]
        gradient = gradient_BHSV[:, :, start:stop]
        logits_BHST = product("bhsd,bhtd->bhst", query, key, jnp.float32) * scale
        weights_BHST = jnp.exp(logits_BHST - log_sum_BHS1[:, :, start:stop])
        weights_BHST = jnp.where(_visible(start, stop, segment_ids_BS), weights_BHST, 0)
        of_weights_BHST = product("bhsv,bhtv->bhst", gradient, value, jnp.float32)
        of_logits_BHST = weights_BHST * (of_weights_BHST - mean_BHS1[:, :, start:stop]) * scale
        weights_BHST, of_logits_BHST = weights_BHST.astype(value.dtype), of_logits_BHST.astype(key.dtype)
        of_query.append(product("bhst,bhtd->bhsd", of_logits_BHST, key, query.dtype))
        of_key.append(product("bhst,bhsd->bhtd", of_logits_BHST, query, jnp.float32))
        of_value.append(product("bhst,bhsv->bhtv", weights_BHST, gradient, jnp.float32))
    of_key_BHSd, of_value_BHSV = _sum_over_blocks(of_key), _sum_over_blocks(of_value)
    return jnp.concatenate(of_query, axis=2), of_key_BHSd.astype(key.dtype), of_value_BHSV.astype(value.dtype)


def _sum_over_blocks(gradients_BHTd: list[Array]) -> Array:
    """[B, H, S, d] from the gradients of the keys that each block saw, every block's more than the one's before."""
    total = gradients_BHTd[0]
    for gradient in gradients_BHTd[1:]:
        total = gradient + jnp.pad(total, ((0, 0), (0, 0), (0, gradient.shape[2] - total.shape[2]), (0, 0)))
    return total


def _query_blocks(sequence: int) -> list[tuple[int, int]]:
    """Start and stop of each block of queries. Causality lets it see the keys up to `stop`."""
    block = max(-(-sequence // QUERY_BLOCKS), SMALLEST_QUERY_BLOCK)
    return [(start, min(start + block, sequence)) for start in range(0, sequence, block)]


def _visible(start: int, stop: int, segment_ids_BS: Array | None) -> Array:
    """bool [1 or B, 1, stop - start, stop]: the keys each query of a block attends to, always itself among them."""
    visible = jnp.arange(stop)[None, None, :] <= jnp.arange(start, stop)[None, :, None]
    if segment_ids_BS is not None:
        visible &= segment_ids_BS[:, None, :stop] == segment_ids_BS[:, start:stop, None]
    return visible[:, None]


def product(equation: str, left: Array, right: Array, output: jnp.dtype) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=output)
