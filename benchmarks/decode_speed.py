"""Greedy decoding against transformers, and against what the machine could do at most.

python -m benchmarks.decode_speed CONFIG [--batch=1] [--rounds=5] [--alone] [--mesh.tensor=1] [--mesh.data=1]

CONFIG names a file in configs/. Both sides have random parameters of that shape, prefill prompts of 64 tokens and make
128 more of each; prefill is in the time, compilation is not. Prints the ratio to transformers as it comes and to its
fastest variant; of one prompt also the most the first could be here if a token were nothing but its matrix products.

Then a step after the prompt beside its bound: its weights and cache read once at the rate of one sum over a large
array, or its products at the rate of one large product, whichever takes longer. --alone prints that only.

Our side runs on one device, or on a mesh of as many as JAX_NUM_CPU_DEVICES says, as infer.py does.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from flax import nnx
from jax import Array

from benchmarks import transformers_baseline as baseline
from benchmarks.interleaved import interleaved, ratio
from benchmarks.machine import MachineRates, machine_rates
from dsv3_jax.command_line import load_config, run_main
from dsv3_jax.config import MeshConfig
from dsv3_jax.data.tokenizer import special_tokens, train_tokenizer
from dsv3_jax.inference.arguments import ONE_DEVICE
from dsv3_jax.inference.generation import Generator, cache_bucket
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.weights import unstacked
from dsv3_jax.layout import mesh_to_run
from dsv3_jax.model.attention import MultiHeadLatentAttention
from dsv3_jax.model.functional import parameter_specs, put_together, skeleton_of, take_apart, to_run
from dsv3_jax.model.layers import FeedForward
from dsv3_jax.model.moe import MixtureOfExperts
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.runtime import set_up_compiler, use_one_thread
from dsv3_jax.training.flops import forward_flops, parameter_counts
from sharding.mesh import shardings


class Decoded(NamedTuple):
    speed: float
    """Greedy tokens/s of all prompts together, their prefill included."""
    step: float
    """Seconds of a step after the prompts: one token more for each."""


def decoder(model: ModelConfig, batch: int, on_devices: MeshConfig) -> Callable[[], Decoded]:
    # A tokenizer of any text: only its size matters, and its end token, which is made less probable than the best.
    network, tokenizer = Transformer(model, nnx.Rngs(0)), train_tokenizer(["some text"], model.vocabulary)
    network.head[...] = network.head[...].at[:, special_tokens(tokenizer).end].set(0.0)
    skeleton, mesh = to_run(skeleton_of(model)), mesh_to_run(on_devices)
    placed = jax.device_put(take_apart(network), shardings(mesh, parameter_specs(skeleton, mesh)))
    network = put_together(skeleton, *placed)
    generator = Generator(network, tokenizer)
    random = np.random.default_rng(0)

    def decode() -> Decoded:
        prompts = random.integers(10, 200, (batch, baseline.PROMPT)).tolist()
        start = time.perf_counter()
        chunks = list(generator.generate(prompts, Sampling(temperature=0), baseline.NEW))
        seconds = time.perf_counter() - start
        made = sum(len(ids) for chunk in chunks for ids in chunk.token_ids)
        steps = chunks[1:]
        step = sum(chunk.seconds for chunk in steps) / sum(len(chunk.token_ids[0]) for chunk in steps)
        return Decoded(made / seconds, step)

    decode()
    return decode


def least_step(model: ModelConfig, batch: int, rates: MachineRates) -> tuple[float, float]:
    """Seconds of a step's reads and of its products at this machine's rates, in the middle of the new tokens."""
    counts, positions = parameter_counts(model), baseline.PROMPT + baseline.NEW // 2
    # Experts that at least one of the batch's tokens chose, where every choice is as likely.
    expert = 3 * model.width * model.expert_ffn_width
    chosen = model.experts * (1 - (1 - model.experts_per_token / model.experts) ** batch)
    weights = counts.active + model.moe_layers * (chosen - model.experts_per_token) * expert
    cache = batch * model.layers * positions * model.cache_width
    size = jnp.dtype(model.precision).itemsize
    return (weights + cache) * size / rates.reads, batch * forward_flops(model, positions, decode=True) / rates.products


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


def against_transformers(name: str, model: ModelConfig, batch: int, rounds: int, mesh: MeshConfig) -> None:
    def rate(network: torch.nn.Module) -> float:
        return baseline.decoding_rate(network, batch)

    _, implementation, precision = baseline.fastest(rate, model)
    plain = baseline.build(model, "default", torch.float32)
    best = baseline.build(model, implementation, precision)
    ours = decoder(model, batch, mesh)
    sides = {
        "ours": lambda: ours().speed,
        "plain": lambda: baseline.decode(plain, batch),
        "best": lambda: baseline.decode(best, batch),
    }
    if batch == 1:
        sides["products"] = bare_products(model)
    found = interleaved(sides, rounds)
    speeds = {side: statistics.median(rates) for side, rates in found.items()}
    print(
        f"{name}, batch {batch}: ours {speeds['ours']:,.0f} tokens/s; transformers {speeds['plain']:,.1f}, "
        f"fastest ({implementation}, {precision}) {speeds['best']:,.1f}"
    )
    print(f"ours / transformers: {ratio(found['ours'], found['plain'])}")
    if batch == 1:
        print(f"bare matrix products / transformers: {ratio(found['products'], found['plain'])}")
    print(f"ours / fastest transformers: {ratio(found['ours'], found['best'])}", flush=True)


def beside_its_bound(name: str, model: ModelConfig, batch: int, rounds: int, mesh: MeshConfig) -> None:
    decode = decoder(model, batch, mesh)
    rounds_of = [(least_step(model, batch, machine_rates()), decode().step) for _ in range(rounds)]
    reads, products = (statistics.median(least[side] for least, _ in rounds_of) for side in (0, 1))
    shares = sorted(max(least) / step for least, step in rounds_of)
    step = statistics.median(step for _, step in rounds_of)
    print(
        f"{name}, batch {batch}: a step {1e3 * step:.3f} ms; its reads {1e3 * reads:.3f}, products {1e3 * products:.3f}"
    )
    print(f"share of the bound: {statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f})")


def main(
    name: tyro.conf.Positional[str], batch: int = 1, rounds: int = 5, alone: bool = False, mesh: MeshConfig = ONE_DEVICE
) -> None:
    set_up_compiler()
    model = load_config(name).model
    use_one_thread(model)
    if not alone:
        against_transformers(name, model, batch, rounds, mesh)
    beside_its_bound(name, model, batch, rounds, mesh)


if __name__ == "__main__":
    run_main(lambda: tyro.cli(main, use_underscores=True))
