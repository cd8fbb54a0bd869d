"""A prompt of 131,072 tokens through the Generator or the Engine: `python -m tests.slow.long_prompt engine`.

Prints the new tokens as JSON.
"""

import dataclasses
import json
import sys

import numpy as np
from flax import nnx

from configs.tiny import config as tiny
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.generation import Generator
from dsv3_jax.inference.requests import Event, Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.transformer import Transformer

LENGTH, NEW = 131_072, 4
GREEDY = Sampling(temperature=0.0)
# Half of tiny's layers and heads, which take a quarter of its time.
MODEL = dataclasses.replace(
    tiny.model, layers=2, heads=2, mtp_depth=0, maximum_positions=163_840, yarn_factor=40.0, initializer_std=0.1
)


def main() -> None:
    model, tokenizer = Transformer(MODEL, nnx.Rngs(0)), train_tokenizer(["some text"], MODEL.vocabulary)
    prompt = np.random.default_rng(0).integers(10, 200, LENGTH).tolist()
    made: list[int] = []
    if sys.argv[1] == "engine":

        def hear(event: Event) -> None:
            made.extend(event.token_ids)

        engine = Engine(model, tokenizer, slots=2, cache_tokens=LENGTH + 128, prefill_chunk=1024)
        engine.submit(Request(prompt, GREEDY, NEW), hear)
        while engine.step():
            pass
    else:
        for chunk in Generator(model, tokenizer).generate([prompt], GREEDY, NEW):
            made += chunk.token_ids[0]
    print(json.dumps(made))


if __name__ == "__main__":
    main()
