"""Attention cores: softmax(scale * q k) v, for a whole row and against a latent cache."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.kernels import attention_blocks
from dsv3_jax.kernels.attention_blocks import product
from dsv3_jax.kernels.e5m6 import Packed, packed, unpacked
from sharding.collectives import spread_alike
from sharding.mesh import platform

OUTPUT = "attention"
"""The name of what the gradient needs of the forward pass, for a backward pass that recomputes all but named values."""


def causal_attention(
    query_BSHd: Array,
    key_BSHd: Array,
    value_BSHV: Array,
    scale: float,
    segment_ids_BS: Array | None = None,
    *,
    in_12_bits: bool = False,
) -> Array:
    """Causal attention of rows over themselves.

    Args:
        query_BSHd, key_BSHd: equal head dims.
        value_BSHV: its head dim may differ.
        scale: factor on the logits.
        segment_ids_BS: int32; tokens attend only within equal ids. None: the row is one segment.
        in_12_bits: the result is rounded to E5M6 (e5m6.py), which is what is kept of it for the backward pass.

    Returns:
        [B, S, H, V] in the type of the values. Logits and softmax are float32.
    """
    inputs = spread_alike(query_BSHd, key_BSHd, value_BSHV)
    query_BHSd, key_BHSd, value_BHSV = (x.swapaxes(1, 2) for x in inputs)
    return _causal(query_BHSd, key_BHSd, value_BHSV, segment_ids_BS, scale, in_12_bits).swapaxes(1, 2)


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
    logits_BMT = product("bmx,btx->bmt", query_BMX, cache_BTX, jnp.float32) * scale
    weights_BMT = _softmax(logits_BMT, jnp.repeat(visible_BST, heads, axis=1)).astype(query_BSHX.dtype)
    mixed_BMX = product("bmt,btx->bmx", weights_BMT, cache_BTX, query_BSHX.dtype)
    return mixed_BMX.reshape(query_BSHX.shape)[..., :rank]


# The gradient is written out, as in FlashAttention (arXiv 2205.14135). Of the forward pass it needs one number a query,
# the logarithm of the softmax's denominator: with it a weight is one exponential of its logit, where automatic
# differentiation would keep S^2 weights a head, or take their maximum and sum again.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _causal(query_BHSd, key_BHSd, value_BHSV, segment_ids_BS, scale, in_12_bits):
    return _forward(query_BHSd, key_BHSd, value_BHSV, segment_ids_BS, scale, in_12_bits)[0]


def _forward(query_BHSd, key_BHSd, value_BHSV, segment_ids_BS, scale, in_12_bits):
    inputs = query_BHSd, key_BHSd, value_BHSV, segment_ids_BS
    output_BHSV, log_sum_BHS = _kernels().forward(*inputs, scale)
    output_BHSV, kept = kept_output(output_BHSV, in_12_bits)
    return output_BHSV, (*inputs, kept, checkpoint_name(log_sum_BHS, OUTPUT))


def _backward(scale, in_12_bits, saved, gradient_BHSV):
    *inputs, kept, log_sum_BHS = saved
    output_BHSV = output_of(kept, gradient_BHSV)
    return *_kernels().backward(*inputs, output_BHSV, log_sum_BHS, gradient_BHSV, scale), None


_causal.defvjp(_forward, _backward)


def kept_output(output: Array, in_12_bits: bool) -> tuple[Array, Array | Packed]:
    """Attention's output as the next layer takes it, and as it is kept for the gradient, named."""
    if not in_12_bits:
        output = checkpoint_name(output, OUTPUT)
        return output, output
    kept = Packed(*(checkpoint_name(x, OUTPUT) for x in packed(output)))
    return unpacked(kept, output.shape[-1], output.dtype), kept


def output_of(kept: Array | Packed, gradient: Array) -> Array:
    """The output again; its gradient has its shape and type."""
    return unpacked(kept, gradient.shape[-1], gradient.dtype) if isinstance(kept, Packed) else kept


def _kernels() -> ModuleType:
    """`forward` and `backward` of the platform that is compiled for."""
    if platform() == "tpu":
        from dsv3_jax.kernels import attention_tpu  # Pallas takes a second to import

        return attention_tpu
    return attention_blocks


def _softmax(logits: Array, visible: Array) -> Array:
    """Softmax over the last dim among the visible entries; every query sees at least itself."""
    return jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
