"""The types parameters are held in; that results stay the same, tests/test_loading.py shows."""

import jax
import jax.numpy as jnp

from dsv3_jax.inference.weights import ready_to_decode, with_inference_types


def test_a_bfloat16_model_takes_half_the_memory_and_keeps_norms_and_router(model):
    held = with_inference_types(lambda leaf, dtype: leaf.astype(dtype), model, "bfloat16")
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(one)) for one in (held, model)]
    assert sizes[0] < 0.55 * sizes[1]
    router, experts = held.moe_blocks.feed_forward.router, held.moe_blocks.feed_forward.experts
    kept = [router.weight, router.bias, held.norm.gain, held.moe_blocks.attention.query_norm.gain]
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}
    halved = [held.embedding, held.head, experts.gate_up, held.dense_blocks.attention.key_value_up]
    assert {leaf.dtype for leaf in halved} == {jnp.dtype("bfloat16")}


def test_a_float32_model_is_left_as_it_is(model):
    kinds = []
    with_inference_types(lambda leaf, dtype: kinds.append((leaf.dtype, dtype)), model, "float32")
    assert set(kinds) == {(jnp.dtype("float32"), jnp.dtype("float32"))}


def test_a_model_that_is_ready_to_decode_already_gives_its_own_arrays(model):
    ready = ready_to_decode(model)
    leaves, again = (jax.tree.leaves(one) for one in (ready, ready_to_decode(ready)))
    assert len(leaves) > len(jax.tree.leaves(model))
    assert all(one is other for one, other in zip(leaves, again, strict=True))
