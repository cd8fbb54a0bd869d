"""Generation divided over eight virtual devices: the tokens and the probabilities of one device."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.generation import PREFILL_CHUNK, Generator
from dsv3_jax.inference.placement import PlacementError
from dsv3_jax.inference.requests import EngineError, Event, Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.server.scoring import Scorer
from dsv3_jax.layout import mesh_to_run
from dsv3_jax.model.functional import (
    abstract_trees,
    parameter_specs,
    put_together,
    skeleton_of,
    take_apart,
    to_run,
)
from sharding.mesh import LayoutError, shardings

GREEDY, DRAWN = Sampling(temperature=0.0), Sampling(1.0, 30, 0.95, seed=3)
PENALIZED = Sampling(0.8, seed=5, min_p=0.05, frequency_penalty=0.5)
WIDE = {"expert": 4, "tensor": 2}
SHAPE = {"slots": 8, "cache_tokens": 16 * 4 * 4, "page_size": 16, "prefill_chunk": 16}


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 300, size=length).tolist()


# Not as many as devices that take rows, nor a multiple: rows are added that are nobody's.
PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((5, 1, 16, 7, 12))]


@pytest.fixture(scope="module")
def drafting(model):
    """A small model with an MTP module that prefers a few words, so that drafts are often right."""
    shape, draws = dataclasses.replace(model.model, mtp_depth=1, layers=2), np.random.default_rng(1)
    skeleton = skeleton_of(shape)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(draws.normal(0.0, 0.3, leaf.shape), leaf.dtype)

    parameters, router_bias = jax.tree.map(draw, abstract_trees(skeleton))
    loudness_W = jnp.full(shape.vocabulary, 0.1).at[20:40].set(1.0)
    return put_together(skeleton, parameters | {"head": parameters["head"] * loudness_W}, router_bias)


@pytest.fixture(scope="module")
def divided(drafting, mesh_with):
    """`divided(expert=4, tensor=2)`: the model over such a mesh, as `load` places it."""

    def place(**sizes: int):
        skeleton, mesh = to_run(skeleton_of(drafting.model)), mesh_with(**sizes)
        return put_together(
            skeleton, *jax.device_put(take_apart(drafting), shardings(mesh, parameter_specs(skeleton, mesh)))
        )

    return place


def made_by(generator: Generator, sampling: Sampling, prompts=PROMPTS, tokens: int = 20) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for chunk in generator.generate(prompts, sampling, tokens):
        assert len(chunk.token_ids) == len(prompts)
        for row, new_ids in zip(rows, chunk.token_ids, strict=True):
            row += new_ids
    return rows


@pytest.fixture(scope="module")
def alone(drafting, tokenizer):
    """What one device makes of the prompts with two drafts; greedily it is the same without."""
    generator = Generator(drafting, tokenizer, 2)
    return {sampling: made_by(generator, sampling) for sampling in (GREEDY, DRAWN)}


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"data": 2, "fsdp": 2, "node": 2}], ids=str)
def test_a_batch_says_what_it_says_on_one_device(divided, alone, tokenizer, sizes):
    assert made_by(Generator(divided(**sizes), tokenizer), GREEDY) == alone[GREEDY]


@pytest.mark.parametrize("chunk", [PREFILL_CHUNK, 8], ids=["whole", "pieces"])
def test_drafts_and_draws_do_not_depend_on_the_mesh(divided, alone, tokenizer, chunk):
    generator = Generator(divided(**WIDE), tokenizer, 2, prefill_chunk=chunk)
    for sampling in (GREEDY, DRAWN) if chunk == PREFILL_CHUNK else (DRAWN,):
        assert made_by(generator, sampling) == alone[sampling]


@pytest.fixture(scope="module")
def engines(drafting, divided, tokenizer):
    return [Engine(model, tokenizer, speculative=2, **SHAPE) for model in (drafting, divided(**WIDE))]


def visit(engine: Engine) -> list[list[Event]]:
    """Requests that come at random steps; some begin alike, two are cancelled."""
    draw, events, tickets = random.Random(5), list[list[Event]](), []
    while len(events) < 16 or any(not each or each[-1].finish is None for each in events):
        while len(events) < 16 and draw.random() < 0.5:
            prompt = prompt_of(draw.choice((1, 17, 34)), 0 if draw.random() < 0.5 else draw.randrange(99))
            sampling, tokens = draw.choice((GREEDY, DRAWN, PENALIZED)), draw.choice((1, 9, 24))
            request = Request(prompt, sampling, tokens, logprobs=2, routed_experts=True)
            events.append([])
            tickets.append(engine.submit(request, events[-1].append))
            if len(events) % 8 == 0:
                engine.cancel(tickets[-1])
        engine.step()
        engine.check()
    return events


def test_requests_come_and_go_as_on_one_device(engines):
    of_one, of_several = map(visit, engines)
    for expected, events in zip(of_one, of_several, strict=True):
        assert events[-1].finish == expected[-1].finish
        tokens, wanted = ([token for event in each for token in event.token_ids] for each in (events, expected))
        assert tokens == wanted
        experts, wanted = ([one for event in each for one in event.routed_experts or ()] for each in (events, expected))
        assert experts == wanted
        found, wanted = ([one.logprob for event in each for one in event.logprobs or ()] for each in (events, expected))
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    counted = engines[1].statistics()
    assert (counted.running, counted.waiting, counted.pages_used) == (0, 0, 0)
    assert counted.reused_tokens > 0 and counted.accepted[0] > 0


def test_every_part_of_the_slots_has_pages_of_its_own(engines):
    engine = engines[1]
    assert engine.most_positions == 64
    with pytest.raises(EngineError, match="need 65 positions, and the cache holds 64"):
        engine.submit(Request(prompt_of(60, 1), GREEDY, 5), lambda _: None)
    # Two slots a part, and pages for one such request.
    events: list[list[Event]] = [[] for _ in range(8)]
    for each in events:
        engine.submit(Request(prompt_of(34, 2), GREEDY, 20), each.append)
    running = []
    while engine.step():
        engine.check()
        running.append(engine.statistics().running)
    assert max(running) == 4
    assert len({tuple(token for event in each for token in event.token_ids) for each in events}) == 1


def test_a_prompt_is_scored_as_on_one_device(drafting, divided, tokenizer):
    prompt = prompt_of(30, 4)
    of_one, of_several = (Scorer(model, tokenizer)(prompt, 1) for model in (drafting, divided(**WIDE)))
    assert [scored.token_id for scored in of_several] == prompt[1:]
    np.testing.assert_allclose([s.logprob for s in of_several], [s.logprob for s in of_one], atol=1e-4)


def test_what_does_not_fit_is_refused(divided, tokenizer):
    with pytest.raises(EngineError, match="slots=6 must be a multiple of 4"):
        Engine(divided(**WIDE), tokenizer, **SHAPE | {"slots": 6})
    with pytest.raises(EngineError, match="cache_tokens=63 must be at least page_size=16, times the 4 parts"):
        Engine(divided(**WIDE), tokenizer, **SHAPE | {"cache_tokens": 63})
    with pytest.raises(PlacementError, match="mesh.context=2 must be 1 to generate"):
        mesh_to_run(MeshConfig(data=4, context=2))
    with pytest.raises(LayoutError, match="mesh.expert=4 makes 4, which must be the number of devices, 8"):
        mesh_to_run(MeshConfig(data=1, expert=4))
    assert mesh_to_run(MeshConfig(data=1)).size == 1
