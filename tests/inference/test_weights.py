"""The types parameters are held in; that results stay the same, tests/test_loading.py shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsv3_jax
from dsv3_jax.inference.weights import ready_to_decode, with_inference_types
from dsv3_jax.kernels import float8_matmul, float8_matmul_tpu
from dsv3_jax.model import layers
from tests.reference.hf_checkpoint import fabricate


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


# 192: a block ends within the width, and with it.
@pytest.mark.parametrize(("expert_ffn_width", "prepare"), [(128, nnx.clone), (192, nnx.clone), (192, ready_to_decode)])
def test_multiplied_as_codes_a_model_says_what_it_says_dequantised(
    tmp_path, tiny_model, monkeypatch, expert_ffn_width, prepare
):
    """By the kernel for TPUs, emulated. Every token has all experts, as rounding may change which ones it chooses."""
    whole_blocks = {
        "width": 256, "dense_ffn_width": 256, "heads": 2, "query_latent": 128, "key_value_latent": 128,
        "nope_head_dim": 64, "rope_head_dim": 64, "value_head_dim": 64, "expert_ffn_width": expert_ffn_width,
        "experts": 2, "experts_per_token": 2, "expert_groups": 1, "groups_per_token": 1, "layers": 2, "mtp_depth": 0,
    }  # fmt: skip
    fabricate(tmp_path, tiny_model(**whole_blocks), dtype="fp8")
    held, _, _ = dsv3_jax.load(tmp_path, dtype="bfloat16", weights="float8")
    structure, state = nnx.split(prepare(held))
    tokens_BS, multiplied = np.arange(24, dtype=np.int32).reshape(2, 12), []

    def logits() -> np.ndarray:
        def compute(state, tokens_BS):
            model = nnx.merge(structure, state)
            return model.logits(model.norm(model.hidden_states(tokens_BS)[0]))

        return np.asarray(jax.jit(compute)(state, tokens_BS))

    def emulated(*arguments):
        multiplied.append(arguments[1].shape)
        return kernel(*arguments, interpret=True)

    dequantised, kernel = logits(), float8_matmul_tpu.product
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    monkeypatch.setattr(float8_matmul, "platform", lambda: "tpu")
    monkeypatch.setattr(float8_matmul_tpu, "product", emulated)
    found = logits()
    assert {1, 2} == {experts for experts, _, _ in multiplied}
    # Another order of summing can change a product's last bit of bfloat16: half of it is 2^-9 of a number at most.
    assert np.linalg.norm(found - dequantised) < 2**-9 * np.linalg.norm(dequantised)
    assert (found != dequantised).any()
