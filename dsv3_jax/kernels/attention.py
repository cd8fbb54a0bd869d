"""Attention cores: softmax(scale * q k) v, for a whole row and against a latent cache."""

import jax
import jax.numpy as jnp
from jax import Array

# Query rows are taken in at most this many blocks, each against no more keys than causality allows: half of the
# products and of the softmax are never computed. The count is bounded because the blocks are unrolled.
QUERY_BLOCKS = 8
SMALLEST_QUERY_BLOCK = 64


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
    block = max(-(-sequence // QUERY_BLOCKS), SMALLEST_QUERY_BLOCK)
    outputs = []
    for start in range(0, sequence, block):
        stop = min(start + block, sequence)
        visible = jnp.arange(stop)[None, None, :] <= jnp.arange(start, stop)[None, :, None]
        if segment_ids_BS is not None:
            visible &= segment_ids_BS[:, None, :stop] == segment_ids_BS[:, start:stop, None]
        outputs.append(
            _attention(query_BSHd[:, start:stop], key_BSHd[:, :stop], value_BSHV[:, :stop], scale, visible)
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def absorbed_attention(query_BSHX: Array, cache_BTX: Array, rank: int, scale: float, positions_BS: Array) -> Array:
    """Attention of absorbed queries over a latent cache: one key, shared by all heads, of which the first part is the value.

    Args:
        query_BSHX: [B, S, H, C + R].
        cache_BTX: [B, T, C + R], entry t at position t.
        rank: C.
        scale: factor on the logits.
        positions_BS: int32; a query sees the entries up to and including its own position.

    Returns:
        [B, S, H, C] in the type of the queries. Logits and softmax are float32.
    """
    visible_BST = jnp.arange(cache_BTX.shape[1])[None, None, :] <= positions_BS[:, :, None]
    logits_BHST = _product("bshx,btx->bhst", query_BSHX, cache_BTX, jnp.float32) * scale
    weights_BHST = _softmax(logits_BHST, visible_BST[:, None]).astype(query_BSHX.dtype)
    return _product("bhst,btc->bshc", weights_BHST, cache_BTX[..., :rank], query_BSHX.dtype)


def _attention(query_BSHd: Array, key_BTHd: Array, value_BTHV: Array, scale: float, visible_BST: Array) -> Array:
    logits_BHST = _product("bshd,bthd->bhst", query_BSHd, key_BTHd, jnp.float32) * scale
    weights_BHST = _softmax(logits_BHST, visible_BST[:, None]).astype(value_BTHV.dtype)
    return _product("bhst,bthv->bshv", weights_BHST, value_BTHV, value_BTHV.dtype)


def _softmax(logits: Array, visible: Array) -> Array:
    """Softmax over the last dim among the visible entries; every query sees at least itself."""
    return jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)


def _product(equation: str, left: Array, right: Array, output: jnp.dtype) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=output)
