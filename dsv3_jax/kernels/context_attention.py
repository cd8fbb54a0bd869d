"""Causal attention of a device's positions over whole rows, for rows divided over devices (sharding/context.py)."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.kernels.attention import OUTPUT, kept_output, output_of
from sharding.collectives import axis_size, spread_alike, spread_like
from sharding.context import CONTEXT_AXES, context_chunks


def context_attention(
    query_BSHd: Array,
    key_BTHd: Array,
    value_BTHV: Array,
    scale: float,
    segment_ids: tuple[Array, Array] | None = None,
    *,
    in_12_bits: bool = False,
) -> Array:
    """Causal attention of this device's two chunks of queries over the keys of whole rows.

    Args:
        query_BSHd: two chunks of T / (2 * devices) positions.
        key_BTHd, value_BTHV: every position, in order.
        scale: factor on the logits.
        segment_ids: int32, of the queries and of the keys; tokens attend only within equal ids.
        in_12_bits: as of `causal_attention`.

    Returns:
        [B, S, H, V] in the type of the values. Logits and softmax are float32.
    """
    inputs = spread_alike(query_BSHd, key_BTHd, value_BTHV)
    query_BHSd, key_BHTd, value_BHTV = (x.swapaxes(1, 2) for x in inputs)
    return _attention(query_BHSd, key_BHTd, value_BHTV, segment_ids, scale, in_12_bits).swapaxes(1, 2)


# Chunk c sees key blocks 0 .. c, chunk 2n - 1 - c sees 0 .. 2n - 1 - c: on every device 2n + 1 products of a chunk with
# a block, which is a number known when compiling. They are taken one after the other with a running softmax, and the
# gradient is written out from the logarithm of its denominator (FlashAttention, arXiv 2205.14135).


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(query_BHSd, key_BHTd, value_BHTV, segment_ids, scale, in_12_bits):
    return _forward(query_BHSd, key_BHTd, value_BHTV, segment_ids, scale, in_12_bits)[0]


def _forward(query_BHSd, key_BHTd, value_BHTV, segment_ids, scale, in_12_bits):
    batch, heads, length, _ = query_BHSd.shape
    queries = _chunked(query_BHSd)
    rows = (2, batch, heads, length // 2)
    zeros = (jnp.full((*rows, 1), -jnp.inf), jnp.zeros((*rows, 1)), jnp.zeros((*rows, value_BHTV.shape[-1])))
    start = tuple(spread_like(x, query_BHSd, key_BHTd, value_BHTV) for x in zeros)

    def product(carry, step):
        mine, chunk, block = _pair(step)
        query, key, value = queries[mine], _block(key_BHTd, block, length), _block(value_BHTV, block, length)
        logits = _logits(query, key, scale, mine, chunk, block, segment_ids)
        largest, total, mixed = (x[mine] for x in carry)
        new_largest = jnp.maximum(largest, logits.max(axis=-1, keepdims=True))
        # A row of another segment's keys alone has no largest logit yet.
        shift = jnp.where(jnp.isfinite(new_largest), new_largest, 0.0)
        weights, old = jnp.exp(logits - shift), jnp.exp(largest - shift)
        total = total * old + weights.sum(axis=-1, keepdims=True)
        mixed = mixed * old + _product("bhst,bhtv->bhsv", weights.astype(value.dtype), value, jnp.float32)
        updated = (new_largest, total, mixed)
        return tuple(x.at[mine].set(new) for x, new in zip(carry, updated, strict=True)), None

    (largest, total, mixed), _ = jax.lax.scan(product, start, jnp.arange(_steps()))
    output, kept = kept_output(_joined(mixed / total).astype(value_BHTV.dtype), in_12_bits)
    log_sum = checkpoint_name(largest + jnp.log(total), OUTPUT)
    return output, (query_BHSd, key_BHTd, value_BHTV, segment_ids, kept, log_sum)


def _backward(scale, in_12_bits, saved, gradient_BHSV):
    query_BHSd, key_BHTd, value_BHTV, segment_ids, kept, log_sum = saved
    output_BHSV = output_of(kept, gradient_BHSV)
    length = query_BHSd.shape[2]
    queries, gradients = _chunked(query_BHSd), _chunked(gradient_BHSV)
    mean = _chunked(jnp.sum(gradient_BHSV.astype(jnp.float32) * output_BHSV, axis=-1, keepdims=True))
    inputs = (queries, key_BHTd, value_BHTV)
    start = tuple(spread_like(jnp.zeros(x.shape, jnp.float32), *inputs, gradient_BHSV) for x in inputs)

    def product(carry, step):
        of_queries, of_keys, of_values = carry
        mine, chunk, block = _pair(step)
        query, key, value = queries[mine], _block(key_BHTd, block, length), _block(value_BHTV, block, length)
        gradient = gradients[mine]
        weights = jnp.exp(_logits(query, key, scale, mine, chunk, block, segment_ids) - log_sum[mine])
        of_weights = _product("bhsv,bhtv->bhst", gradient, value, jnp.float32)
        of_logits = (weights * (of_weights - mean[mine]) * scale).astype(key.dtype)
        of_queries = of_queries.at[mine].add(_product("bhst,bhtd->bhsd", of_logits, key, jnp.float32))
        of_keys = _add_block(of_keys, block, _product("bhst,bhsd->bhtd", of_logits, query, jnp.float32))
        of_value = _product("bhst,bhsv->bhtv", weights.astype(value.dtype), gradient, jnp.float32)
        return (of_queries, of_keys, _add_block(of_values, block, of_value)), None

    (of_queries, of_keys, of_values), _ = jax.lax.scan(product, start, jnp.arange(_steps()))
    of_query = _joined(of_queries).astype(query_BHSd.dtype)
    return of_query, of_keys.astype(key_BHTd.dtype), of_values.astype(value_BHTV.dtype), None


_attention.defvjp(_forward, _backward)


def _steps() -> int:
    return 2 * axis_size(CONTEXT_AXES) + 1


def _pair(step: Array) -> tuple[Array, Array, Array]:
    """Which of this device's chunks, which chunk of the row that is, and which block of keys."""
    first, second = context_chunks()
    is_second = (step > first).astype(jnp.int32)
    return is_second, jnp.where(is_second, second, first), step - is_second * (first + 1)


def _logits(query, key, scale, mine, chunk, block, segment_ids) -> Array:
    length = query.shape[2]
    place_S, place_T = chunk * length + jnp.arange(length), block * length + jnp.arange(length)
    visible = (place_T[None, :] <= place_S[:, None])[None, None]
    if segment_ids is not None:
        of_query = jax.lax.dynamic_slice_in_dim(segment_ids[0], mine * length, length, 1)
        of_key = jax.lax.dynamic_slice_in_dim(segment_ids[1], block * length, length, 1)
        visible &= (of_query[:, :, None] == of_key[:, None, :])[:, None]
    return jnp.where(visible, _product("bhsd,bhtd->bhst", query, key, jnp.float32) * scale, -jnp.inf)


def _chunked(x_BHSd: Array) -> Array:
    """[2, B, H, S / 2, d]."""
    return jnp.stack(jnp.split(x_BHSd, 2, axis=2))


def _joined(chunks: Array) -> Array:
    return jnp.concatenate([chunks[0], chunks[1]], axis=2)


def _block(x_BHTd: Array, block: Array, length: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x_BHTd, block * (length // 2), length // 2, 2)


def _add_block(total_BHTd: Array, block: Array, part: Array) -> Array:
    length = part.shape[2]
    before = jax.lax.dynamic_slice_in_dim(total_BHTd, block * length, length, 2)
    return jax.lax.dynamic_update_slice_in_dim(total_BHTd, before + part, block * length, 2)


def _product(equation: str, left: Array, right: Array, output: jnp.dtype) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=output)
