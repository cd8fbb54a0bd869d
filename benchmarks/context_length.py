"""What a long context costs, beside what the machine's own rates allow.

python -m benchmarks.context_length CONFIG [THOUSANDS ...]

CONFIG names a file in configs/, with random parameters and YaRN as in V3; contexts are of so many times 1024 tokens, by
default 1 to 128. Prints for each the prompt's tokens/s and the milliseconds of a token after it, compilation in
neither, and the least they could be here: a prompt's products at the rate of one large product, and a token's weights
and cache, read once, at the rate of one sum over a large array. Peak memory is the process's so far.
"""

import dataclasses
import resource
import sys
import time

import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.machine import machine_rates
from dsv3_jax.command_line import load_config
from dsv3_jax.data.tokenizer import special_tokens, train_tokenizer
from dsv3_jax.inference.generation import Generator
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.runtime import set_up_compiler
from dsv3_jax.training.flops import parameter_counts

CONTEXTS = (1, 4, 16, 32, 64, 128)
NEW = 72
GREEDY = Sampling(temperature=0)
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def generator_of(model: ModelConfig) -> Generator:
    network, tokenizer = Transformer(model, nnx.Rngs(0)), train_tokenizer(["some text"], model.vocabulary)
    # The end token is made less probable than the best.
    network.head[...] = network.head[...].at[:, special_tokens(tokenizer).end].set(0.0)
    return Generator(network, tokenizer)


def measured(generator: Generator, context: int) -> tuple[float, float]:
    """Seconds of a prompt of `context` tokens, and of a token after it."""
    prompt = np.random.default_rng(context).integers(10, 200, context).tolist()
    # Compiles: a shorter prompt of the same shapes.
    short = min(context, 2 * generator.prefill_chunk)
    chunks = generator.generate([prompt[:short]], GREEDY, context + NEW - short)
    next(chunks), next(chunks)
    start = time.perf_counter()
    chunks = generator.generate([prompt], GREEDY, NEW)
    next(chunks)
    prefill = time.perf_counter() - start
    next(chunks)
    rest = list(chunks)
    return prefill, sum(chunk.seconds for chunk in rest) / sum(len(chunk.token_ids[0]) for chunk in rest)


def least(model: ModelConfig, context: int, products: float, reads: float) -> tuple[float, float]:
    """The same at this machine's rates, of products a second and of bytes."""
    active, size = parameter_counts(model).active, jnp.dtype(model.precision).itemsize
    # A query and an entry it sees: a product for the logit and one for the mixture, each of the cache's width.
    pairs = model.layers * context * (context + 1) // 2
    operations = 2 * active * context + pairs * model.heads * 4 * model.cache_width
    cache = model.layers * context * model.cache_width
    return operations / products, (active + cache) * size / reads


def main() -> None:
    set_up_compiler()
    name, *thousands = sys.argv[1:]
    yarn = {"yarn_factor": 40.0, "yarn_original_length": 4096, "maximum_positions": 163_840}
    model = dataclasses.replace(load_config(name).model, **yarn)
    products, reads = machine_rates()
    print(f"{name}: {products / 1e9:,.0f} GFLOP/s, {reads / 1e9:,.1f} GB/s")
    generator = generator_of(model)
    for context in (1024 * int(number) for number in thousands or CONTEXTS):
        prefill, token = measured(generator, context)
        least_prefill, least_token = least(model, context, products, reads)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
        print(
            f"{context:7,}: prompt {prefill:6.1f} s (at least {least_prefill:5.1f}), {context / prefill:,.0f} tokens/s",
            f"token {1e3 * token:6.2f} ms (at least {1e3 * least_token:5.2f})",
            f"peak {memory / 1e6:,.0f} MB",
            sep="; ",
            flush=True,
        )


if __name__ == "__main__":
    main()
