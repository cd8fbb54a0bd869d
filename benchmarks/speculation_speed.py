"""Speculative decoding against plain greedy decoding of the same model, in one run.

python -m benchmarks.speculation_speed WORKDIR [--drafts=1] [--rounds=6] [--tokens=512]

Prints, as the median and range of interleaved rounds, tokens a second over plain decoding; how many drafts stayed; the
bound that leaves, tokens a pass / (1 + cost of the drafts relative to a plain step), which a pass over several tokens
would reach if it took no longer than one over a single token; and the share of the bound that is reached. Both sides
give the same tokens, or the benchmark fails.
"""

import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

import dsv3_jax
from benchmarks.interleaved import interleaved, ratio
from dsv3_jax.command_line import run_main
from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.inference.completion import Drafted, prompt_ids
from dsv3_jax.inference.generation import Generator
from dsv3_jax.inference.sampling import Sampling, most_probable
from dsv3_jax.inference.weights import unstacked
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.runtime import set_up_compiler, use_one_thread

GREEDY = Sampling(temperature=0.0)
PROMPT_CHARACTERS = 400
REPEATED = 200


def main(workdir: tyro.conf.Positional[Path], drafts: int = 1, rounds: int = 6, tokens: int = 512) -> None:
    set_up_compiler()
    use_one_thread(dsv3_jax.load(workdir)[1].model)
    model, config, tokenizer = dsv3_jax.load(workdir)
    assert tokenizer is not None
    text = open_corpus(config.data).validation[0].text[:PROMPT_CHARACTERS]
    prompt = prompt_ids(tokenizer, text)
    made: dict[str, list[int]] = {}
    fared = Drafted(drafts)

    def side(name: str, generator: Generator, drafted: Drafted) -> float:
        made[name], seconds = [], 0.0
        for chunk in generator.generate([prompt], GREEDY, tokens):
            made[name] += chunk.token_ids[0]
            seconds += chunk.seconds
            drafted.add(chunk)
        return (len(made[name]) - 1) / seconds

    plain, speculative = Generator(model, tokenizer), Generator(model, tokenizer, drafts)
    sides = {
        "speculative": lambda: side("speculative", speculative, fared),
        "plain": lambda: side("plain", plain, Drafted(0)),
    }
    for measure in sides.values():
        measure()
    assert made["plain"] == made["speculative"], "speculation changed the text"
    found = interleaved(sides, rounds)
    step = 1 / statistics.median(found["plain"])
    cost = draft_seconds(model, len(prompt) + tokens) / step
    bound = fared.tokens_per_pass / (1 + drafts * cost)
    reached = [speed / (bound * one) for speed, one in zip(found["speculative"], found["plain"], strict=True)]
    stays = ", ".join(f"{share:.0%}" for share in fared.acceptance)
    print(f"{workdir}: {drafts} drafts, {len(made['plain'])} tokens, {statistics.median(found['plain']):,.0f} a second")
    print(f"  speculative / plain {ratio(found['speculative'], found['plain'])}")
    print(f"  {fared.tokens_per_pass:.2f} tokens a pass; drafts that stay: {stays}; a draft costs {cost:.2f} of a step")
    share = f"{statistics.median(reached):.0%} of it ({min(reached):.0%} to {max(reached):.0%})"
    print(f"  bound {bound:.2f}; reached {share}")


def draft_seconds(model: Transformer, positions: int) -> float:
    """Of one draft: the MTP module on one token, the head, the most probable id; the best of three."""

    @jax.jit
    def many(model: Transformer) -> jax.Array:
        cache, state = model.empty_draft_cache(1, positions), jnp.ones((1, 1, model.model.width))

        def one(index, carry):
            token, state, cache = carry
            state, cache = model.draft(state, token[:, None], cache, jnp.full((1, 1), index % positions))
            return most_probable(model.logits(state))[:, 0], state, cache

        return jax.lax.fori_loop(0, REPEATED, one, (jnp.zeros(1, jnp.int32), state, cache))[0]

    held = unstacked(model)
    many(held).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        many(held).block_until_ready()
        seconds.append((time.perf_counter() - start) / REPEATED)
    return min(seconds)


if __name__ == "__main__":
    run_main(lambda: tyro.cli(main, use_underscores=True))
