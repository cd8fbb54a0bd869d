"""Greedy decoding of one prompt against transformers.

python -m benchmarks.decode_speed CONFIG

CONFIG names a file in configs/. Both sides have random parameters of that shape, prefill 64 tokens and make 128 more;
prefill is in the time, compilation is not. Prints the ratio to transformers as it comes and to its fastest variant, and
the most the first could be here if a token were nothing but its matrix products.
"""

import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax import Array

from benchmarks import transformers_baseline as baseline
from benchmarks.interleaved import interleaved, ratio
from dsv3_jax.command_line import load_config
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizer import special_tokens, train_tokenizer
from dsv3_jax.inference.generation import Generator, cache_bucket
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.weights import unstacked
from dsv3_jax.model.attention import MultiHeadLatentAttention
from dsv3_jax.model.layers import FeedForward
from dsv3_jax.model.moe import MixtureOfExperts
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.runtime import set_up_compiler, use_one_thread

ROUNDS = 5


def decoder(model: ModelConfig) -> Callable[[], float]:
    """Greedy tokens/s of one prompt."""
    # A tokenizer of any text: only its size matters, and its end token, which is made less probable than the best.
    network, tokenizer = Transformer(model, nnx.Rngs(0)), train_tokenizer(["some text"], model.vocabulary)
    network.head[...] = network.head[...].at[:, special_tokens(tokenizer).end].set(0.0)
    generator = Generator(network, tokenizer)
    random = np.random.default_rng(0)

    def decode() -> float:
        prompt = random.integers(10, 200, baseline.PROMPT).tolist()
        start = time.perf_counter()
        chunks = list(generator.generate([prompt], Sampling(temperature=0), baseline.NEW))
        return sum(len(chunk.token_ids[0]) for chunk in chunks) / (time.perf_counter() - start)

    decode()
    return decode


def bare_products(model: ModelConfig) -> Callable[[], float]:
    """Tokens/s of a compiled loop over the matrix products of a token, each waiting for the one before as in the model.

    There are no norms, no softmax, no choice of experts, nothing is written to the cache and nothing sampled.
    """
    network = unstacked(Transformer(model, nnx.Rngs(0)))
    nope, rank = model.nope_head_dim, model.key_value_latent
    cache_TX = jnp.ones((cache_bucket(baseline.PROMPT + baseline.NEW, model), model.cache_width))
    blocks = [block for stack in network.stacks() for block in stack]
    # In the layouts that their products read.
    up_HCd = [block.attention.key_value_up[...].swapaxes(0, 1) for block in blocks]
    ups = [(up[..., :nope].swapaxes(1, 2).copy(), up[..., nope:].copy()) for up in up_HCd]

    def attended(x_D: Array, attention: MultiHeadLatentAttention, key_up_HPC: Array, value_up_HCV: Array) -> Array:
        if model.query_latent is None:
            query_Hd = jnp.einsum("d,dhe->he", x_D, attention.query[...])
        else:
            query_Hd = jnp.einsum("q,qhe->he", x_D @ attention.query_down[...], attention.query_up[...])
        latent_HC = jnp.einsum("hp,hpc->hc", query_Hd[:, :nope], key_up_HPC)
        latent_HX = jnp.concatenate([latent_HC, query_Hd[:, nope:]], axis=1) + x_D @ attention.key_value_down[...]
        mixed_HC = (latent_HX @ cache_TX.T @ cache_TX)[:, :rank]
        return jnp.einsum("hv,hvd->d", jnp.einsum("hc,hcv->hv", mixed_HC, value_up_HCV), attention.output[...])

    def fed(x_D: Array, layer: FeedForward) -> Array:
        gate, up = (x_D @ layer.gate_up[...].reshape(model.width, -1)).reshape(2, -1)
        return (gate * up) @ layer.down[...]

    def mixed(x_D: Array, layer: MixtureOfExperts) -> Array:
        # Which experts is not known before the router's product.
        scores_E = x_D @ layer.router.weight[...]
        chosen_K = jnp.arange(model.experts_per_token) + jnp.isnan(scores_E[0])
        gate_up_EDF = layer.experts.gate_up[...].reshape(model.experts, model.width, -1)
        rows_KD = jnp.tile(x_D, (model.experts_per_token, 1))
        gate, up = jnp.split(jnp.einsum("kd,kdf->kf", rows_KD, gate_up_EDF[chosen_K]), 2, axis=1)
        of_experts_D = jnp.einsum("kf,kfd->kd", gate * up, layer.experts.down[...][chosen_K]).sum(axis=0)
        return of_experts_D + fed(x_D, layer.shared) if model.shared_experts else of_experts_D

    # As leaves: flattening modules takes longer than a few tokens.
    leaves, structure = jax.tree.flatten((network.head[...], blocks, ups))

    @jax.jit
    def tokens(leaves: list[Array], x_D: Array) -> Array:
        head_DW, blocks, ups = jax.tree.unflatten(structure, leaves)

        def one(_, x_D: Array) -> Array:
            for block, up in zip(blocks, ups, strict=True):
                x_D += attended(x_D, block.attention, *up)
                layer = block.feed_forward
                x_D += mixed(x_D, layer) if isinstance(layer, MixtureOfExperts) else fed(x_D, layer)
            return x_D / (x_D @ head_DW).max()

        return jax.lax.fori_loop(0, baseline.NEW, one, x_D)

    def run() -> float:
        start = time.perf_counter()
        tokens(leaves, x_D).block_until_ready()
        return baseline.NEW / (time.perf_counter() - start)

    x_D = jnp.ones(model.width)
    run()
    return run


def main() -> None:
    set_up_compiler()
    (name,) = sys.argv[1:]
    model = load_config(name).model
    use_one_thread(model)
    _, implementation, precision = baseline.fastest(baseline.decoding_rate, model)
    plain = baseline.build(model, "default", torch.float32)
    best = baseline.build(model, implementation, precision)
    sides = {
        "ours": decoder(model),
        "products": bare_products(model),
        "plain": lambda: baseline.decode(plain),
        "best": lambda: baseline.decode(best),
    }
    found = interleaved(sides, ROUNDS)
    speeds = {side: statistics.median(rates) for side, rates in found.items()}
    print(
        f"{name}, batch 1: ours {speeds['ours']:,.0f} tokens/s; transformers {speeds['plain']:,.1f}, "
        f"fastest ({implementation}, {precision}) {speeds['best']:,.1f}"
    )
    print(f"ours / transformers: {ratio(found['ours'], found['plain'])}")
    print(f"bare matrix products / transformers: {ratio(found['products'], found['plain'])}")
    print(f"ours / fastest transformers: {ratio(found['ours'], found['best'])}")


if __name__ == "__main__":
    main()
