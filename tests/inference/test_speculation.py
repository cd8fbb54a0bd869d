"""Speculative decoding: the same text greedily, the same distribution at a temperature, and drafts of MTP's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.data.tokenizer import special_tokens
from dsv3_jax.inference.completion import Drafted
from dsv3_jax.inference.generation import GenerationError, Generator
from dsv3_jax.inference.sampling import Sampling, SamplingInputs
from dsv3_jax.inference.speculation import Drafts, verify
from dsv3_jax.model.functional import abstract_trees, put_together, skeleton_of, take_apart

GREEDY = Sampling(temperature=0.0)
forward = jax.jit(lambda model, tokens_BS: model(tokens_BS))


@pytest.fixture(scope="module")
def drafting(model):
    """The small model with two MTP modules, of which the first drafts, and fewer blocks, as each is compiled."""
    shape, random = dataclasses.replace(model.model, mtp_depth=2, layers=2), np.random.default_rng(1)
    skeleton = skeleton_of(shape)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(random.normal(0.0, 0.3, leaf.shape), leaf.dtype)

    return put_together(skeleton, *jax.tree.map(draw, abstract_trees(skeleton)))


def few_words(model, known: list[int]):
    """The model with a head that knows some ids alone: drafts are often right by chance."""
    parameters, router_bias = take_apart(model)
    head = np.zeros_like(parameters["head"])
    head[:, known] = np.asarray(parameters["head"])[:, known]
    return put_together(skeleton_of(model.model), parameters | {"head": jnp.asarray(head)}, router_bias)


def made_by(generator: Generator, drafts: int, prompts, sampling: Sampling, tokens: int):
    rows: list[list[int]] = [[] for _ in prompts]
    drafted = Drafted(drafts)
    for chunk in generator.generate(prompts, sampling, tokens):
        drafted.add(chunk)
        for row, new_ids in zip(rows, chunk.token_ids, strict=True):
            row += new_ids
    return rows, drafted


def prompts_of(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(10, 300, size=length).tolist() for length in lengths]


# Six rows everywhere, in the same buckets: compilation is most of this file's time.
PROMPTS = prompts_of(5, 1, 16, 7, 8, 10)


@pytest.mark.parametrize(
    ("words", "drafts"), [(None, 2), ([20, 21, 22, 23], 1), ([20, 21, 22, 23], 2), ([], 2)], ids=str
)
def test_trap_I1_greedy_is_plain_greedy_token_for_token(drafting, tokenizer, words, drafts):
    model = drafting if words is None else few_words(drafting, words)
    plain, _ = made_by(Generator(model, tokenizer), 0, PROMPTS, GREEDY, 60)
    speculative, drafted = made_by(Generator(model, tokenizer, drafts), drafts, PROMPTS, GREEDY, 60)
    assert speculative == plain
    accepted = drafted.acceptance
    assert accepted == sorted(accepted, reverse=True) and len(accepted) == drafts
    if words == []:
        # All logits are 0 and the lowest id wins: all drafts stay.
        assert accepted == [1.0] * 2
    elif words:
        assert 0.05 < accepted[0] < 0.95


def test_a_row_ends_at_its_end_token_be_it_a_draft_or_not(drafting, tokenizer):
    end = special_tokens(tokenizer).end
    model = few_words(drafting, [end, 21, 22, 23, 24, 25])
    plain, _ = made_by(Generator(model, tokenizer), 0, PROMPTS, GREEDY, 12)
    assert {row[-1] == end for row in plain} == {True, False}
    assert made_by(Generator(model, tokenizer, 2), 2, PROMPTS, GREEDY, 12)[0] == plain


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_no_more_tokens_than_asked_for(drafting, tokenizer, tokens):
    model = few_words(drafting, [])
    rows, _ = made_by(Generator(model, tokenizer, 2), 2, PROMPTS, GREEDY, tokens)
    assert [len(row) for row in rows] == [tokens] * 6


def test_to_the_last_position_of_the_model(drafting, tokenizer):
    most = drafting.model.maximum_positions - max(map(len, PROMPTS))
    plain, _ = made_by(Generator(drafting, tokenizer), 0, PROMPTS, GREEDY, most)
    assert made_by(Generator(drafting, tokenizer, 2), 2, PROMPTS, GREEDY, most)[0] == plain


def test_traps_T1_T4_drafting_states_are_those_of_training(drafting):
    """Embedding first, one shift, positions as they are; prefill and decode as the whole row at once."""
    tokens_BS = np.array(prompts_of(24, 24), np.int32)
    following_BSk = np.stack([np.roll(tokens_BS, -1 - depth, axis=1) for depth in range(2)], axis=2)

    @jax.jit
    def states(model):
        hidden_BSD, _ = model.hidden_states(tokens_BS)
        whole = model.mtp_states(hidden_BSD, following_BSk)[0][0]
        state_BSD, cache = model.drafting_state(hidden_BSD), model.empty_draft_cache(2, 32)
        positions_BS = jnp.broadcast_to(jnp.arange(24), (2, 24))
        made, cache = model.draft_prefill(state_BSD[:, :16], following_BSk[:, :16, 0], cache)
        parts = [made]
        for first, last in ((16, 17), (17, 20), (20, 24)):
            new = slice(first, last)
            made, cache = model.draft(state_BSD[:, new], following_BSk[:, new, 0], cache, positions_BS[:, new])
            parts.append(made)
        return whole, jnp.concatenate(parts, axis=1)

    whole, parts = states(drafting)
    np.testing.assert_allclose(parts[:, :23], whole[:, :23], atol=1e-5, rtol=1e-5)


def inputs_of(sampling: Sampling, rows: int) -> SamplingInputs:
    return SamplingInputs.of([sampling] * rows, range(rows))


def require_distribution(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square, at five standard deviations of its own."""
    expected = probabilities * counts.sum()
    assert (counts[expected == 0] == 0).all() and (expected > 0).sum() > 1
    tested = expected > 0
    statistic = ((counts[tested] - expected[tested]) ** 2 / expected[tested]).sum()
    freedom = tested.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", [Sampling(1.0, 0, 1.0), Sampling(2.0, 4, 0.95)])
def test_a_verdict_has_the_distribution_of_the_model_whatever_the_drafts(sampling):
    """Two drafts from a wrong model, 40,000 rows: first token, then second where the first draft stayed."""
    rows, words = 40_000, 6
    random = np.random.default_rng(3)
    model_logits = random.normal(0, 1.5, (3, words)).astype(np.float32)
    of_drafts = random.dirichlet(np.ones(words), 2).astype(np.float32)
    drawn = np.stack([random.choice(words, rows, p=q / q.sum()) for q in of_drafts.astype(np.float64)], axis=1)
    drafts = Drafts(jnp.asarray(drawn, jnp.int32), jnp.broadcast_to(of_drafts, (rows, 2, words)))
    logits_BnW = jnp.broadcast_to(model_logits, (rows, 3, words))
    verdict = jax.jit(verify)(logits_BnW, drafts, inputs_of(sampling, rows), jnp.full(rows, 7))
    accepted, following = np.asarray(verdict.accepted_B), np.asarray(verdict.next_B)
    exact = [_slow_probabilities(logits, sampling) for logits in model_logits]
    first = np.where(accepted >= 1, drawn[:, 0], following)
    require_distribution(np.bincount(first, minlength=words), exact[0])
    second = np.where(accepted >= 2, drawn[:, 1], following)[accepted >= 1]
    require_distribution(np.bincount(second, minlength=words), exact[1])
    require_distribution(np.bincount(following[accepted == 2], minlength=words), exact[2])
    # As many drafts stay as can: the overlap of both distributions.
    overlap = np.minimum(exact[0], of_drafts[0]).sum()
    assert abs((accepted >= 1).mean() - overlap) < 5 * np.sqrt(overlap * (1 - overlap) / rows)


def _slow_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    probabilities = np.exp(logits.astype(np.float64) / sampling.temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    if sampling.top_k:
        probabilities[order[sampling.top_k :]] = 0
        probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= sampling.top_p]] = 0
    return probabilities / probabilities.sum()


def test_generated_text_has_the_distribution_of_the_model(drafting, tokenizer):
    """The joint distribution of three tokens, over 3,000 rows of one prompt, against the plain forward pass."""
    sampling = Sampling(1.0, 3, 1.0, seed=5)
    model = few_words(drafting, [20, 21, 22, 23])
    (prompt,) = prompts_of(6)
    rows, drafted = made_by(Generator(model, tokenizer, 2), 2, [prompt] * 3000, sampling, 3)
    assert 0.1 < drafted.acceptance[0] < 0.95
    counts: dict[tuple[int, ...], int] = {}
    for row in rows:
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1

    def next_probabilities(tokens: list[int]) -> np.ndarray:
        padded = np.array([tokens + [0] * (16 - len(tokens))], np.int32)
        return _slow_probabilities(np.asarray(forward(model, padded))[0, len(tokens) - 1, :300], sampling)

    end, exact = special_tokens(tokenizer).end, {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, p in exact.items():
            if end in tokens:
                longer[tokens] = p
                continue
            following = next_probabilities([*prompt, *tokens])
            longer |= {(*tokens, int(token)): p * following[token] for token in np.flatnonzero(following)}
        exact = longer
    assert counts.keys() <= exact.keys()
    require_distribution(
        np.array([counts.get(tokens, 0) for tokens in exact]), np.array([exact[tokens] for tokens in exact])
    )


def test_no_drafts_without_an_mtp_module(model, tokenizer):
    with pytest.raises(GenerationError, match="speculative=2 must be at least 0, and 0 for a model without MTP module"):
        Generator(model, tokenizer, 2)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8)])
def test_parameters_that_are_not_finite_are_told(drafting, tokenizer, sampling):
    parameters, router_bias = take_apart(drafting)
    broken = parameters | {"norm": {"gain": parameters["norm"]["gain"] * np.nan}}
    model = put_together(skeleton_of(drafting.model), broken, router_bias)
    with pytest.raises(GenerationError, match="NaN"):
        made_by(Generator(model, tokenizer, 2), 2, PROMPTS, sampling, 5)


def test_penalties_count_the_drafts_before(drafting, tokenizer):
    """Greedy text under penalties, against the plain forward pass with penalties written out."""
    sampling = Sampling(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7)
    model = few_words(drafting, [20, 21, 22, 23])
    rows, drafted = made_by(Generator(model, tokenizer, 2), 2, PROMPTS, sampling, 12)
    assert made_by(Generator(model, tokenizer), 0, PROMPTS, sampling, 12)[0] == rows
    assert 0.05 < drafted.acceptance[0] < 0.95
    for prompt, row in zip(PROMPTS, rows, strict=True):
        padded = np.array([[*prompt, *row] + [0] * (32 - len(prompt) - len(row))], np.int32)
        logits_SW = np.asarray(forward(model, padded))[0]
        for place, token in enumerate(row):
            logits = logits_SW[len(prompt) + place - 1, :300].copy()
            for seen in {*prompt, *row[:place]}:
                logits[seen] = logits[seen] / 1.3 if logits[seen] > 0 else logits[seen] * 1.3
            for seen in set(row[:place]):
                logits[seen] -= 0.4 + 0.7 * row[:place].count(seen)
            assert logits[token] > logits.max() - 1e-4, (prompt, place)
