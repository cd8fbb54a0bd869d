"""Generation through the cache, against the model's plain forward pass over whole sequences."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.data.tokenizer import special_tokens
from dsv3_jax.inference import generation
from dsv3_jax.inference.generation import (
    FIRST_CHUNK,
    FLOWING_SECONDS,
    GenerationError,
    Generator,
    cache_bucket,
    prompt_bucket,
)
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.weights import unstacked
from dsv3_jax.model.functional import put_together, skeleton_of, take_apart
from tests.reference.transformer import hidden_states, plain_row

GREEDY = Sampling(temperature=0.0)
# Prompts and lengths below share a few bucketed shapes: compilation is most of this file's time.
forward = jax.jit(lambda model, tokens_BS: model(tokens_BS))


def ids_of(generator: Generator, prompts: list[list[int]], sampling: Sampling, tokens: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for chunk in generator.generate(prompts, sampling, tokens):
        for row, new_ids in zip(rows, chunk.token_ids, strict=True):
            row += new_ids
    return rows


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(10, 300, size=length).tolist() for length in lengths]


def argmax_of_whole(model, prompt: list[int], continuation: list[int]) -> list[int]:
    """The most probable known token after the prompt and after each token of its continuation but the last."""
    whole_1S = np.zeros((1, 128), np.int32)
    whole_1S[0, : len(prompt) + len(continuation)] = prompt + continuation
    logits_SW = np.asarray(forward(model, whole_1S))[0, len(prompt) - 1 :][: len(continuation), :300]
    return logits_SW.argmax(axis=1).tolist()


def with_head(model, change):
    """The model with `change` applied to its head [D, W]."""
    parameters, router_bias = take_apart(model)
    changed = parameters | {"head": change(np.array(parameters["head"]))}
    return put_together(skeleton_of(model.model), jax.tree.map(jnp.asarray, changed), router_bias)


@pytest.fixture(scope="module")
def generator(model, tokenizer):
    return Generator(model, tokenizer)


@pytest.mark.parametrize("held", [lambda model: model, unstacked], ids=["stacked", "unstacked"])
def test_padded_prefill_and_decode_have_the_logits_of_the_whole_sequence(model, held):
    held_model = held(model)

    @jax.jit
    def prefill(model, tokens_BS, cache):
        hidden_BSD, cache, _ = model.prefill(tokens_BS, cache)
        return model.logits(model.norm(hidden_BSD)), cache

    @jax.jit
    def decode(model, tokens_B1, cache, positions_B1):
        hidden_B1D, cache, experts_B1LK = model.decode(tokens_B1, cache, positions_B1)
        return model.logits(model.norm(hidden_B1D)), cache, experts_B1LK

    rows, lengths_B = np.arange(2), np.array([3, 16])
    whole_BS = np.array(prompts_of([22, 22]), np.int32)
    padded_BS = np.where(np.arange(16) < lengths_B[:, None], whole_BS[:, :16], 0)
    logits_BSW, cache = prefill(held_model, padded_BS, model.empty_cache(2, 32))
    made, routed = [logits_BSW[rows, lengths_B - 1]], []
    for positions_B in lengths_B + np.arange(6)[:, None]:
        tokens_B1 = whole_BS[rows, positions_B][:, None]
        logits_B1W, cache, experts_B1LK = decode(held_model, tokens_B1, cache, positions_B[:, None])
        made.append(logits_B1W[:, 0])
        routed.append(np.asarray(experts_B1LK[:, 0]))
    expected_BSW = np.asarray(forward(model, whole_BS))
    for step, logits_BW in enumerate(made):
        np.testing.assert_allclose(logits_BW, expected_BSW[rows, lengths_B - 1 + step], atol=1e-5, rtol=1e-5)
    # Of both MoE layers, against the numpy oracle.
    as_numpy = [jax.tree.map(np.asarray, tree) for tree in take_apart(model)]
    for row, length in enumerate(lengths_B):
        _, gates = hidden_states(plain_row(whole_BS[row]), *as_numpy, model.model)
        experts_LSK = np.array([[gate.experts for gate in of_layer] for of_layer in gates])
        wanted_SLK = np.moveaxis(experts_LSK, 0, 1)[length : length + 6]
        np.testing.assert_array_equal([experts_BLK[row] for experts_BLK in routed], wanted_SLK)


@pytest.mark.parametrize("lengths", [[5], [1, 40], [16, 17]])
def test_greedy_is_the_argmax_of_the_whole_sequence_at_every_token(generator, model, tokenizer, lengths):
    prompts = prompts_of(lengths)
    rows = ids_of(generator, prompts, GREEDY, 4 * FIRST_CHUNK + 5)
    assert len(set(itertools.chain(*rows))) > 8
    for prompt, row in zip(prompts, rows, strict=True):
        assert len(row) == 4 * FIRST_CHUNK + 5 or row[-1] == special_tokens(tokenizer).end
        assert argmax_of_whole(model, prompt, row) == row


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 0, 1.0, seed=3), Sampling(0.9, 20, 0.9)])
def test_a_row_of_a_batch_is_its_prompt_alone(generator, sampling):
    prompts = prompts_of([4, 40])
    together = ids_of(generator, prompts, sampling, 24)
    assert together[0] == ids_of(generator, prompts[:1], sampling, 24)[0]
    # Streams belong to places in the batch: the others keep theirs beside any neighbours.
    others = prompts_of([50], seed=9) + prompts[1:]
    assert together[1] == ids_of(generator, others, sampling, 24)[1]


def test_fewer_tokens_are_the_beginning_of_more(generator):
    (prompt,), sampling = prompts_of([12]), Sampling(1.0, 0, 1.0, seed=1)
    most = ids_of(generator, [prompt], sampling, 100)[0]
    for tokens in (1, 2, FIRST_CHUNK, FIRST_CHUNK + 1, FIRST_CHUNK + 2):
        assert ids_of(generator, [prompt], sampling, tokens)[0] == most[:tokens]


def test_a_seed_repeats_and_another_differs(generator):
    prompts = prompts_of([8, 8])
    prompts[1] = prompts[0]
    first, second = ids_of(generator, prompts, Sampling(1.0, seed=1), 20)
    assert first != second
    assert [first, second] == ids_of(generator, prompts, Sampling(1.0, seed=1), 20)
    assert first != ids_of(generator, prompts, Sampling(1.0, seed=2), 20)[0]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 0, 1.0), Sampling(1.0, 5, 0.9)])
def test_ids_the_tokenizer_lacks_never_come_out_however_probable(model, tokenizer, sampling):
    assert tokenizer.get_vocab_size() == 300

    def raise_padding(head_DW: np.ndarray) -> np.ndarray:
        head_DW[:, 300:] *= 100
        return head_DW

    tempted = with_head(model, raise_padding)
    prompts = prompts_of([4, 7])
    assert all(int(forward(tempted, np.array([prompt]))[0, -1].argmax()) >= 300 for prompt in prompts)
    rows = ids_of(Generator(tempted, tokenizer), prompts, sampling, 20)
    assert max(itertools.chain(*rows)) < 300


def test_a_row_stops_after_the_end_token_and_the_others_go_on(generator, model, tokenizer):
    prompts = prompts_of([5, 9])
    free = ids_of(generator, prompts, GREEDY, 30)
    end = special_tokens(tokenizer).end
    assert end not in free[0] + free[1]
    # A token of the first row alone that comes late: where the model says it, it shall say the end token.
    stop = next(place for place in range(2, 30) if free[0][place] not in free[0][:place] + free[1])

    def swap(head_DW: np.ndarray) -> np.ndarray:
        head_DW[:, [end, free[0][stop]]] = head_DW[:, [free[0][stop], end]]
        return head_DW

    stopping = Generator(with_head(model, swap), tokenizer)
    assert ids_of(stopping, prompts, GREEDY, 30) == [[*free[0][:stop], end], free[1]]
    # Alone, it ends the work too.
    chunks = list(stopping.generate(prompts[:1], GREEDY, 100))
    assert sum(len(chunk.token_ids[0]) for chunk in chunks) == stop + 1 and len(chunks) < 5


def test_a_prompt_may_hold_the_end_token(generator, tokenizer):
    end = special_tokens(tokenizer).end
    assert len(ids_of(generator, [[end, 20, end]], GREEDY, 5)[0]) == 5


def test_the_last_position_is_used_and_none_after_it(generator, model):
    (prompt,) = prompts_of([118])
    row = ids_of(generator, [prompt], GREEDY, 10)[0]
    assert len(row) == 10
    assert argmax_of_whole(model, prompt, row) == row
    message = "118 tokens and max_new_tokens=11 need 129 .*maximum_positions=128"
    with pytest.raises(GenerationError, match=message) as caught:
        ids_of(generator, [[1], prompt], GREEDY, 11)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("prompts", "tokens"), [([], 5), ([[1], []], 5), ([[1]], 0)])
def test_nothing_to_do_is_refused(generator, prompts, tokens):
    with pytest.raises(GenerationError, match="nothing to continue|max_new_tokens=0 must be at least 1"):
        ids_of(generator, prompts, GREEDY, tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_diverged_is_told(model, tokenizer, temperature):
    broken = Generator(with_head(model, lambda head_DW: head_DW * np.nan), tokenizer)
    with pytest.raises(GenerationError, match="logits are NaN"):
        ids_of(broken, [[1, 2]], Sampling(temperature), 5)


def test_time_is_counted_for_all_but_the_first_token(generator):
    chunks = list(generator.generate(prompts_of([5]), GREEDY, FIRST_CHUNK + 3))
    assert [len(chunk.token_ids[0]) for chunk in chunks] == [1, FIRST_CHUNK, 2]
    assert chunks[0].seconds == 0 and all(chunk.seconds > 0 for chunk in chunks[1:])


def test_lengths_fall_into_few_buckets(model):
    config = dataclasses.replace(model.model, maximum_positions=3000)
    assert [prompt_bucket(tokens, config) for tokens in (1, 16, 17, 1024, 1025, 2049)] == [16, 16, 32, 1024, 2048, 3000]
    assert [cache_bucket(tokens, config) for tokens in (1, 128, 129, 2049, 3000)] == [128, 128, 256, 3000, 3000]
    assert len({cache_bucket(tokens, config) for tokens in range(1, 3001)}) == 6
    assert all(prompt_bucket(tokens, config) <= cache_bucket(tokens + 1, config) for tokens in range(1, 3000))


@pytest.mark.parametrize(
    ("seconds", "expected"), [(FLOWING_SECONDS / 4, [1, 8, 16, 32, 40]), (FLOWING_SECONDS, [1] + 12 * [8])]
)
def test_chunks_grow_while_text_still_flows(model, tokenizer, monkeypatch, seconds, expected):
    now = itertools.count(step=seconds)
    monkeypatch.setattr(generation.time, "perf_counter", lambda: next(now))

    def never_the_end(head_DW: np.ndarray) -> np.ndarray:
        head_DW[:, special_tokens(tokenizer).end] = 0.0  # below the best of three hundred random logits
        return head_DW

    generator = Generator(with_head(model, never_the_end), tokenizer)
    chunks = list(generator.generate(prompts_of([5]), GREEDY, sum(expected)))
    assert [len(chunk.token_ids[0]) for chunk in chunks] == expected
