"""Greedy decoding of one prompt against transformers.

python -m benchmarks.decode_speed CONFIG

CONFIG names a file in configs/. Both sides have random parameters of that shape, prefill 64 tokens and make 128 more;
prefill is in the time, compilation is not. Prints the ratio to transformers as it comes, and to its fastest variant.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from flax import nnx

from benchmarks import transformers_baseline as baseline
from benchmarks.interleaved import interleaved, ratio
from dsv3_jax.command_line import load_config
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizer import special_tokens, train_tokenizer
from dsv3_jax.inference.generation import Generator
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.runtime import set_up_compiler

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


def main() -> None:
    set_up_compiler()
    (name,) = sys.argv[1:]
    model = load_config(name).model
    _, implementation, precision = baseline.fastest(baseline.decoding_rate, model)
    plain = baseline.build(model, "default", torch.float32)
    best = baseline.build(model, implementation, precision)
    sides = {"ours": decoder(model), "plain": lambda: baseline.decode(plain), "best": lambda: baseline.decode(best)}
    found = interleaved(sides, ROUNDS)
    speeds = {side: statistics.median(rates) for side, rates in found.items()}
    print(
        f"{name}, batch 1: ours {speeds['ours']:,.0f} tokens/s; transformers {speeds['plain']:,.1f}, "
        f"fastest ({implementation}, {precision}) {speeds['best']:,.1f}"
    )
    print(f"ours / transformers: {ratio(found['ours'], found['plain'])}")
    print(f"ours / fastest transformers: {ratio(found['ours'], found['best'])}")


if __name__ == "__main__":
    main()
