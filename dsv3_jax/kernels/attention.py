"""Attention cores: softmax(scale * q k) v, for a whole row and against a latent cache."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import spread_alike

# Query rows are taken in at most this many blocks, each against no more keys than causality allows: up to half of the
# products and of the softmax are never computed. The count is bounded because the blocks are unrolled.
QUERY_BLOCKS = 8
SMALLEST_QUERY_BLOCK = 128


def causal_attention(
    query_BSHd: Array, key_BSHd: Array, value_BSHV: Array, scale: float, segment_ids_BS: Array | None = None
) -> Array:
    """Causal attention of rows over themselves.

    Args:
        query_BSHd, key_BSHd: equal head dims.
        value_BSHV: its head dim may differ.
        scale: factor on the logits.
        segment_ids_BS: int32; tokens attend only within equal ids. None: the row is one segment.

    Returns:
        [B, S, H, V] in the type of the values. Logits and softmax are float32.
    """
    inputs = spread_alike(query_BSHd, key_BSHd, value_BSHV)
    query_BHSd, key_BHSd, value_BHSV = (x.swapaxes(1, 2) for x in inputs)
    return _causal(query_BHSd, key_BHSd, value_BHSV, segment_ids_BS, scale).swapaxes(1, 2)


def absorbed_attention(query_BSHX: Array, cache_BTX: Array, rank: int, scale: float, positions_BS: Array) -> Array:
    """Attention of absorbed queries over a latent cache: one key for all heads, of which the first part is the value.

    Args:
        query_BSHX: [B, S, H, C + R].
        cache_BTX: [B, T, C + R], entry t at position t.
        rank: C.
        scale: factor on the logits.
        positions_BS: int32; a query sees the entries up to and including its own position.

    Returns:
        [B, S, H, C] in the type of the queries. Logits and softmax are float32.
    """
    batch, new, heads, width = query_BSHX.shape
    # All heads share the keys, so tokens and heads together are the rows of one matmul; and the values are taken from
    # the product with the whole entries, because slicing them out first would copy the cache.
    visible_BST = jnp.arange(cache_BTX.shape[1])[None, None, :] <= positions_BS[:, :, None]
    query_BMX = query_BSHX.reshape(batch, new * heads, width)
    logits_BMT = _product("bmx,btx->bmt", query_BMX, cache_BTX, jnp.float32) * scale
    weights_BMT = _softmax(logits_BMT, jnp.repeat(visible_BST, heads, axis=1)).astype(query_BSHX.dtype)
    mixed_BMX = _product("bmt,btx->bmx", weights_BMT, cache_BTX, query_BSHX.dtype)
    return mixed_BMX.reshape(query_BSHX.shape)[..., :rank]


# The gradient is written out, as in FlashAttention (arXiv 2205.14135). Of the forward pass it needs one number a query,
# the logarithm of the softmax's denominator: with it a weight is one exponential of its logit, where automatic
# differentiation would keep S^2 weights a head, or take their maximum and sum again.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal(query_BHSd: Array, key_BHSd: Array, value_BHSV: Array, segment_ids_BS: Array | None, scale: float) -> Array:
    return _forward(query_BHSd, key_BHSd, value_BHSV, segment_ids_BS, scale)[0]


def _forward(query_BHSd, key_BHSd, value_BHSV, segment_ids_BS, scale):
    outputs, log_sums = [], []
    for start, stop in _query_blocks(query_BHSd.shape[2]):
        query, key, value = query_BHSd[:, :, start:stop], key_BHSd[:, :, :stop], value_BHSV[:, :, :stop]
        logits_BHST = _product("bhsd,bhtd->bhst", query, key, jnp.float32) * scale
        logits_BHST = jnp.where(_visible(start, stop, segment_ids_BS), logits_BHST, -jnp.inf)
        largest_BHS1 = logits_BHST.max(axis=-1, keepdims=True)
        weights_BHST = jnp.exp(logits_BHST - largest_BHS1)
        sum_BHS1 = weights_BHST.sum(axis=-1, keepdims=True)
        mixed_BHSV = _product("bhst,bhtv->bhsv", weights_BHST.astype(value.dtype), value, jnp.float32)
        outputs.append((mixed_BHSV / sum_BHS1).astype(value.dtype))
        log_sums.append(largest_BHS1 + jnp.log(sum_BHS1))
    output_BHSV, log_sum_BHS1 = (jnp.concatenate(blocks, axis=2) for blocks in (outputs, log_sums))
    return output_BHSV, (query_BHSd, key_BHSd, value_BHSV, segment_ids_BS, output_BHSV, log_sum_BHS1)


def _backward(scale, saved, gradient_BHSV):
    query_BHSd, key_BHSd, value_BHSV, segment_ids_BS, output_BHSV, log_sum_BHS1 = saved
    # A softmax takes from each weight's gradient their mean, which needs no weights: sum_t w_t (g . v_t) = g . output.
    mean_BHS1 = jnp.sum(gradient_BHSV.astype(jnp.float32) * output_BHSV, axis=-1, keepdims=True)
    of_query, of_key, of_value = [], [], []
    for start, stop in _query_blocks(query_BHSd.shape[2]):
        query, key, value = query_BHSd[:, :, start:stop], key_BHSd[:, :, :stop], value_BHSV[:, :, :stop]
        gradient = gradient_BHSV[:, :, start:stop]
        logits_BHST = _product("bhsd,bhtd->bhst", query, key, jnp.float32) * scale
        weights_BHST = jnp.exp(logits_BHST - log_sum_BHS1[:, :, start:stop])
        weights_BHST = jnp.where(_visible(start, stop, segment_ids_BS), weights_BHST, 0)
        of_weights_BHST = _product("bhsv,bhtv->bhst", gradient, value, jnp.float32)
        of_logits_BHST = weights_BHST * (of_weights_BHST - mean_BHS1[:, :, start:stop]) * scale
        weights_BHST, of_logits_BHST = weights_BHST.astype(value.dtype), of_logits_BHST.astype(key.dtype)
        of_query.append(_product("bhst,bhtd->bhsd", of_logits_BHST, key, query.dtype))
        of_key.append(_product("bhst,bhsd->bhtd", of_logits_BHST, query, jnp.float32))
        of_value.append(_product("bhst,bhsv->bhtv", weights_BHST, gradient, jnp.float32))
    of_key_BHSd, of_value_BHSV = _sum_over_blocks(of_key), _sum_over_blocks(of_value)
    return jnp.concatenate(of_query, axis=2), of_key_BHSd.astype(key.dtype), of_value_BHSV.astype(value.dtype), None


_causal.defvjp(_forward, _backward)


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


def _softmax(logits: Array, visible: Array) -> Array:
    """Softmax over the last dim among the visible entries; every query sees at least itself."""
    return jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)


def _product(equation: str, left: Array, right: Array, output: jnp.dtype) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=output)
