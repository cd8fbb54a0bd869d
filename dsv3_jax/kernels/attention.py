"""Attention cores: softmax(scale * q k) v, for a whole row and against a latent cache."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

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
    sequence = query_BSHd.shape[1]
    query_BHSd, key_BHSd, value_BHSV = (x.swapaxes(1, 2) for x in (query_BSHd, key_BSHd, value_BSHV))
    block = max(-(-sequence // QUERY_BLOCKS), SMALLEST_QUERY_BLOCK)
    outputs = []
    for start in range(0, sequence, block):
        stop = min(start + block, sequence)
        visible = jnp.arange(stop)[None, None, :] <= jnp.arange(start, stop)[None, :, None]
        if segment_ids_BS is not None:
            visible &= segment_ids_BS[:, None, :stop] == segment_ids_BS[:, start:stop, None]
        query, key, value = query_BHSd[:, :, start:stop], key_BHSd[:, :, :stop], value_BHSV[:, :, :stop]
        outputs.append(_block_attention(query, key, value, scale, visible[:, None]))
    return jnp.concatenate(outputs, axis=2).swapaxes(1, 2)


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


@functools.partial(jax.checkpoint, static_argnums=3)
def _block_attention(query_BHSd: Array, key_BHTd: Array, value_BHTV: Array, scale: float, visible: Array) -> Array:
    """One block of queries. The backward pass recomputes the weights: kept, they would be S^2 numbers a head."""
    weights_BHST = _softmax(_product("bhsd,bhtd->bhst", query_BHSd, key_BHTd, jnp.float32) * scale, visible)
    return _product("bhst,bhtv->bhsv", weights_BHST.astype(value_BHTV.dtype), value_BHTV, value_BHTV.dtype)


def _softmax(logits: Array, visible: Array) -> Array:
    """Softmax over the last dim among the visible entries; every query sees at least itself."""
    return jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)


def _product(equation: str, left: Array, right: Array, output: jnp.dtype) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=output)
