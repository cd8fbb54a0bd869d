"""Prompts that go into the cache in pieces: the same results as whole ones, within and beyond the original context."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import engine_device
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.generation import GenerationError, Generator
from dsv3_jax.inference.requests import Event, Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.kernels import long_attention
from dsv3_jax.model.functional import abstract_trees, put_together, skeleton_of

GREEDY, PIECE = Sampling(temperature=0.0), 16
LONG, NEW, LONGEST_WHOLE = 1100, 6, 1000


@pytest.fixture(scope="module")
def extended(model):
    """With an MTP module, and YaRN from 32 positions to 40 times as many."""
    yarn = {"yarn_factor": 40.0, "yarn_original_length": 32, "maximum_positions": 1280}
    skeleton = skeleton_of(dataclasses.replace(model.model, mtp_depth=1, layers=2, **yarn))
    draws = np.random.default_rng(5)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(draws.normal(0.0, 0.3, leaf.shape), leaf.dtype)

    return put_together(skeleton, *jax.tree.map(draw, abstract_trees(skeleton)))


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(10, 300, size=length).tolist()


def made_by(generator: Generator, prompts: list[list[int]], new: int = NEW) -> tuple[list[list[int]], list[int]]:
    """The new tokens of each row, and how many drafts stayed."""
    rows, accepted = [[] for _ in prompts], 0
    for chunk in generator.generate(prompts, GREEDY, new):
        for row, ids in zip(rows, chunk.token_ids, strict=True):
            row += ids
        accepted += np.array(chunk.accepted)
    return rows, np.asarray(accepted).tolist()


def test_pieces_make_what_whole_prompts_make(extended, tokenizer):
    # The drafts that stay tell whether the MTP module's cache is right too.
    whole, pieces, ones = (Generator(extended, tokenizer, 1, *chunk) for chunk in ([], [PIECE], [1]))
    # A row that ends in an earlier piece than the other, at the end of one, and one token into one.
    for lengths in ([5, 17], [16, 32], [33, 31]):
        prompts = [prompt_of(length) for length in lengths]
        assert made_by(pieces, prompts, 20) == made_by(whole, prompts, 20)
    assert made_by(ones, prompts, 20) == made_by(whole, prompts, 20)
    # One compiled piece, whatever the lengths.
    assert pieces._pieces[1]._cache_size() == 2


def test_far_beyond_the_original_context_it_is_one_forward_pass_and_holds_nobody_up(extended, tokenizer, monkeypatch):
    for module in (long_attention, engine_device):
        monkeypatch.setattr(module, "LONGEST_WHOLE", LONGEST_WHOLE)
    prompt = prompt_of(LONG)
    assert LONG > LONGEST_WHOLE and LONG > 34 * extended.model.yarn_original_length
    ((row,), _) = made_by(Generator(extended, tokenizer, prefill_chunk=256), [prompt])
    whole_1S = np.array([[*prompt, *row[:-1]]], np.int32)
    logits_SW = np.asarray(jax.jit(lambda model, tokens_BS: model(tokens_BS))(extended, whole_1S))[0, LONG - 1 :, :300]
    assert row == logits_SW.argmax(axis=1).tolist()

    # Pages so long that a table of the fewest is one of all: one shape to compile.
    shape = {"slots": 2, "cache_tokens": 1600, "page_size": 320, "prefill_chunk": 256}
    engine, told = Engine(extended, tokenizer, **shape), list[str]()

    def teller(name: str):
        return lambda event: told.append(name + ("." if event.finish else ""))

    events = list[Event]()
    engine.submit(Request([20], Sampling(1.0, 0, 1.0, seed=2), 100), teller("short"))
    engine.step()
    engine.submit(Request(prompt, GREEDY, NEW), lambda event: (events.append(event), teller("long")(event)))
    while engine.step():
        pass
    assert [token for event in events for token in event.token_ids] == row
    # Five pieces, and something for the other one after each.
    assert told.index("long") >= 5 and set(told[: told.index("long")]) <= {"short", "short."}


def test_a_prompt_beyond_the_model_is_refused_with_the_numbers(extended, tokenizer):
    with pytest.raises(GenerationError, match="1280 tokens and max_new_tokens=1 need 1281 .*maximum_positions=1280"):
        made_by(Generator(extended, tokenizer), [[1] * 1280], 1)
    with pytest.raises(GenerationError, match="prefill_chunk=0 must be at least 1"):
        Generator(extended, tokenizer, prefill_chunk=0)
