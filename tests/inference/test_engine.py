"""The engine: every request's result is its own, whoever else comes and goes."""

import dataclasses
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.data.tokenizer import special_tokens
from dsv3_jax.inference import engine_device
from dsv3_jax.inference.engine import SHORT_ROUND, Engine
from dsv3_jax.inference.generation import Generator
from dsv3_jax.inference.requests import EngineBusy, EngineError, Event, Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.functional import abstract_trees, put_together, skeleton_of, take_apart
from dsv3_jax.model.transformer import Transformer
from tests.reference.transformer import hidden_states, plain_row

GREEDY = Sampling(temperature=0.0)
SAMPLINGS = [
    GREEDY,
    Sampling(1.0, 0, 1.0, seed=3),
    Sampling(0.9, 20, 0.9, seed=7),
    Sampling(0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7),
    Sampling(0.8, seed=5, min_p=0.05, frequency_penalty=0.5),
]
# Small enough that requests wait for pages, and long prompts take several pieces. Compilation is most of this file's
# time: all engines have these shapes.
SHAPE = {"slots": 3, "cache_tokens": 16 * 14, "page_size": 16, "prefill_chunk": 16}
KNOWN = list(range(20, 40))
COMPANION = [20] * 60


@pytest.fixture(scope="module")
def drafting(model, tokenizer):
    """A small model with an MTP module that prefers a few words, so that drafts are often right."""
    shape, draws = dataclasses.replace(model.model, mtp_depth=1, layers=2), np.random.default_rng(1)
    skeleton = skeleton_of(shape)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(draws.normal(0.0, 0.3, leaf.shape), leaf.dtype)

    parameters, router_bias = jax.tree.map(draw, abstract_trees(skeleton))
    known = [*KNOWN, special_tokens(tokenizer).end]
    # Not zeros: among equal probabilities a draw is a matter of rounding.
    loudness_W = jnp.full(shape.vocabulary, 0.1).at[jnp.array(known)].set(1.0)
    return put_together(skeleton, parameters | {"head": parameters["head"] * loudness_W}, router_bias)


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "speculative"])
def drafts(request):
    return request.param


@pytest.fixture(scope="module")
def engine(drafting, tokenizer, drafts):
    return Engine(drafting, tokenizer, speculative=drafts, **SHAPE)


@pytest.fixture(scope="module")
def alone(drafting, tokenizer, drafts):
    """What a request gives by itself, from the generator."""
    generator = Generator(drafting, tokenizer, drafts)

    def tokens_of(request: Request) -> list[int]:
        # A second row, which does not matter to the first, for the sake of equal shapes.
        rows = [request.token_ids, COMPANION]
        chunks = generator.generate(rows, request.sampling, request.max_new_tokens)
        ids = [token for chunk in chunks for token in chunk.token_ids[0]]
        stop = next((place for place, token in enumerate(ids) if token in request.stop_ids), len(ids))
        return ids[: stop + 1]

    return tokens_of


class Client:
    """One request and its events."""

    def __init__(self, engine: Engine, request: Request):
        self.request, self.events = request, list[Event]()
        self.ticket = engine.submit(request, self.events.append)

    @property
    def token_ids(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]

    @property
    def finish(self):
        assert all(event.finish is None for event in self.events[:-1])
        return self.events[-1].finish if self.events else None


def work(engine: Engine) -> None:
    while engine.step():
        engine.check()
    engine.check()


def answer(engine: Engine, request: Request) -> Client:
    client = Client(engine, request)
    work(engine)
    return client


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 300, size=length).tolist()


def request_of(draw: random.Random) -> Request:
    length = draw.choice([1, 5, 16, 17, 40, 64])
    # Every other prompt begins as others do.
    prompt = prompt_of(length, seed=0 if draw.random() < 0.5 else draw.randrange(1000))
    stop_ids = frozenset(draw.sample(KNOWN, 2)) if draw.random() < 0.3 else frozenset()
    return Request(prompt, draw.choice(SAMPLINGS), draw.choice([1, 2, 9, 30]), stop_ids)


def visit(engine: Engine, seed: int) -> list[Client]:
    """Twenty requests that come at random steps, some of which are cancelled at others."""
    draw, clients = random.Random(seed), list[Client]()
    while len(clients) < 20 or any(not client.finish for client in clients):
        while len(clients) < 20 and draw.random() < 0.5:
            clients.append(Client(engine, request_of(draw)))
        if clients and draw.random() < 0.1:
            engine.cancel(draw.choice(clients).ticket)
        engine.step()
        engine.check()
    return clients


def test_results_are_those_of_each_request_alone(engine, alone, tokenizer, drafts):
    end, clients = special_tokens(tokenizer).end, [*visit(engine, 1), *visit(engine, 2)]
    shapes = engine._device._prefill._cache_size(), engine._device._decode._cache_size()
    for client in clients:
        expected = alone(client.request)
        if client.finish == "cancelled":
            assert client.token_ids == expected[: len(client.token_ids)]
        else:
            assert client.token_ids == expected
            ended = expected[-1] in client.request.stop_ids | {end}
            assert client.finish == ("stop" if ended else "length")
    assert {client.finish for client in clients} == {"stop", "length", "cancelled"}
    counted = engine.statistics()
    assert counted.generated_tokens == sum(len(client.token_ids) for client in clients)
    assert (counted.running, counted.waiting, counted.pages_used) == (0, 0, 0)
    assert counted.reused_tokens > 0 and len(counted.accepted) == drafts
    assert not drafts or 0.1 < counted.accepted[0] / counted.passes < 0.95
    # Steady state: whoever comes, nothing is compiled.
    visit(engine, 3)
    assert (engine._device._prefill._cache_size(), engine._device._decode._cache_size()) == shapes


def test_samples_of_one_prompt_differ_by_their_index_as_rows_of_a_batch_do(engine, drafting, tokenizer, drafts):
    sampling, rows = Sampling(1.0, 0, 1.0, seed=3), [[], []]
    for chunk in Generator(drafting, tokenizer, drafts).generate([COMPANION, COMPANION], sampling, 9):
        for row, new_ids in zip(rows, chunk.token_ids, strict=True):
            row += new_ids
    clients = [Client(engine, Request(COMPANION, sampling, 9, sample_index=index)) for index in range(2)]
    work(engine)
    assert [client.token_ids for client in clients] == rows and rows[0] != rows[1]


def test_a_known_beginning_is_reused_and_changes_nothing(engine, alone, drafts):
    def count(name: str):
        return getattr(engine.statistics(), name)

    beginning = prompt_of(32, seed=50)
    first, second = ([*beginning, *prompt_of(14, seed=seed)] for seed in (51, 52))
    assert first[32] != second[32]
    of_first: list[tuple[int, ...]] = []
    # Then again from the cache; then another end: an entry of the MTP cache depends on one token more.
    for prompt, reused in ((first, 0), (first, 32), (second, 16 if drafts else 32)):
        before, accepted = count("reused_tokens"), count("accepted")
        request = Request(prompt, GREEDY, 30)
        assert answer(engine, request).token_ids == alone(request)
        assert count("reused_tokens") - before == reused
        of_first.append(tuple(np.subtract(count("accepted"), accepted)))
    # As many drafts stay as without: the MTP module's cache is right too.
    assert of_first[0] == of_first[1]
    # A conversation: what was answered is part of the next prompt.
    said = answer(engine, Request(first, GREEDY, 9)).token_ids
    request, before = Request([*first, *said, 15], GREEDY, 9), count("reused_tokens")
    assert answer(engine, request).token_ids == alone(request)
    assert count("reused_tokens") - before == (len(first) + len(said) - 1) // 16 * 16 >= 48
    # The last token is not reused, because the logits after it are wanted.
    before = count("reused_tokens")
    assert answer(engine, Request(beginning, GREEDY, 5)).token_ids == alone(Request(beginning, GREEDY, 5))
    assert count("reused_tokens") - before == 16


def test_a_long_prompt_holds_nobody_up(engine):
    running = Client(engine, Request(prompt_of(1, seed=6), Sampling(1.0, 0, 1.0, seed=2), 127))
    long = Client(engine, Request(prompt_of(80, seed=60), GREEDY, 2))
    engine.step()
    while not long.events and not running.finish:
        before = len(running.events)
        engine.step()
        # An end is told at once, beside what the round before made.
        assert len(running.events) == before + 1 + bool(running.finish)
    assert len(running.events) >= 5
    engine.cancel(running.ticket)
    work(engine)
    assert long.finish


def test_rounds_are_short_after_another_has_come_or_gone(engine):
    running = Client(engine, Request(prompt_of(1, seed=6), Sampling(1.0, 0, 1.0, seed=2), 127))
    while len(running.ticket.generated) < 20:
        engine.step()
    other = Client(engine, Request(prompt_of(5, seed=7), GREEDY, 3))
    while not other.finish:
        engine.step()
    for most in (SHORT_ROUND, 2 * SHORT_ROUND):
        # Whoever asks again now does not wait for long.
        before = engine.statistics().passes
        engine.step()
        assert 0 < engine.statistics().passes - before <= most and not running.finish
    engine.cancel(running.ticket)
    work(engine)


def test_what_a_round_made_is_told_while_the_device_is_at_the_next(engine, monkeypatch):
    """And the end of a text at once, so that who waits for it may ask again."""
    happened = []
    decode, device_get = engine._device._decode, jax.device_get

    def decoding(*arguments):
        happened.append("begun")
        return decode(*arguments)

    def getting(arrays):
        happened.append("waited for")
        return device_get(arrays)

    monkeypatch.setattr(engine._device, "_decode", decoding)
    monkeypatch.setattr(engine_device.jax, "device_get", getting)
    engine.submit(Request(prompt_of(1, seed=6), GREEDY, 40), lambda event: happened.append(event.finish or "told"))
    work(engine)
    rounds = happened.count("begun")
    assert rounds > 2 and happened == ["begun", "told", "waited for"] * rounds + ["length"]


def test_who_cancels_has_every_token_that_was_made(engine):
    before = engine.statistics().generated_tokens
    client = Client(engine, Request(prompt_of(1, seed=6), GREEDY, 40))
    for _ in range(3):
        engine.step()
    engine.cancel(client.ticket)
    work(engine)
    made = engine.statistics().generated_tokens - before
    assert client.finish == "cancelled" and len(client.token_ids) == made > 3


def test_cancellation_at_any_time_gives_everything_back(engine):
    clients = [Client(engine, Request(prompt_of(60, seed=seed), GREEDY, 30)) for seed in range(70, 75)]
    engine.step()
    # The first is within its prompt; the pages are reserved for two, and a slot is free.
    assert 0 < clients[0].ticket.prefilled < 60 and engine.statistics().waiting == 3
    engine.cancel(clients[0].ticket)
    engine.cancel(clients[4].ticket)
    engine.step()
    engine.check()
    assert clients[0].finish == clients[4].finish == "cancelled" and not clients[0].token_ids
    engine.cancel(clients[0].ticket)  # nothing happens
    work(engine)
    assert {client.finish for client in clients[1:4]} <= {"stop", "length"}
    assert engine.statistics().pages_used == 0


def test_log_probabilities_are_those_of_the_plain_forward_pass(engine, drafting):
    forward = jax.jit(lambda model, tokens_BS: model(tokens_BS))
    request = Request(prompt_of(40, seed=80), SAMPLINGS[4], 20, logprobs=3)
    beside = Client(engine, Request(prompt_of(3), GREEDY, 20))
    none = Client(engine, dataclasses.replace(request, logprobs=0, sample_index=1))
    client = answer(engine, request)
    assert all(event.logprobs is None for event in beside.events)
    made = [logprobs for event in client.events for logprobs in event.logprobs]
    assert len(made) == len(client.token_ids) > 5
    assert all(not logprobs.top for event in none.events for logprobs in event.logprobs)
    whole_1S = np.zeros((1, 64), np.int32)
    whole_1S[0, : 40 + len(made)] = request.token_ids + client.token_ids
    logits_SW = forward(drafting, whole_1S)[0, 39 : 39 + len(made), :300]
    expected_SW = np.asarray(jax.nn.log_softmax(logits_SW))
    for logprobs, token, expected_W in zip(made, client.token_ids, expected_SW, strict=True):
        np.testing.assert_allclose(logprobs.logprob, expected_W[token], atol=1e-4)
        best = np.sort(expected_W)[::-1][:3]
        np.testing.assert_allclose([logprob for _, logprob in logprobs.top], best, atol=1e-4)
        np.testing.assert_allclose([expected_W[token] for token, _ in logprobs.top], best, atol=1e-4)


@pytest.fixture(scope="module")
def made_by(drafting):
    """The experts that the numpy oracle sends each position of a row to, [S, L, K]."""
    as_numpy = [jax.tree.map(np.asarray, tree) for tree in take_apart(drafting)]

    def experts_of(token_ids: list[int]) -> list:
        _, gates = hidden_states(plain_row(np.array(token_ids)), *as_numpy, drafting.model)
        return [[gate.experts for gate in of_layers] for of_layers in zip(*gates, strict=True)]

    return experts_of


def test_the_experts_of_each_token_are_those_of_the_whole_forward_pass_at_the_position_before(engine, made_by, drafts):
    """A prompt of several pieces beside one that does not ask; the same prompt reused; sampled and penalized."""
    prompt = prompt_of(40, seed=81)
    beside = Client(engine, Request(prompt_of(3, seed=82), GREEDY, 30))
    requests = [Request(prompt, SAMPLINGS[index], 30, routed_experts=True) for index in (0, 4, 2)]
    requests.append(Request(prompt_of(1, seed=83), GREEDY, 1, routed_experts=True))
    before = engine.statistics()
    clients = [Client(engine, requests[0])]
    work(engine)
    clients += [Client(engine, request) for request in requests[1:]]
    work(engine)
    for client in clients:
        routed = [experts for event in client.events for experts in event.routed_experts]
        expected = made_by(client.request.token_ids + client.token_ids[:-1])
        assert routed == expected[len(client.request.token_ids) - 1 :]
    assert len(clients[0].token_ids) > 5 and beside.token_ids
    assert all(event.routed_experts is None for event in beside.events)
    after = engine.statistics()
    assert after.reused_tokens - before.reused_tokens == 2 * 32
    assert not drafts or after.accepted[0] > before.accepted[0]


def test_a_model_without_moe_layers_has_an_empty_list_of_them_a_token(model):
    def decoded() -> jax.Array:
        dense, positions_BS = (
            Transformer(dataclasses.replace(model.model, layers=1), nnx.Rngs(0)),
            np.zeros((2, 1), int),
        )
        return dense.decode(positions_BS, dense.empty_cache(2, 8), positions_BS)[2]

    assert np.zeros(jax.eval_shape(decoded).shape)[0].tolist() == [[]]


def test_nan_ends_its_request_and_harms_no_other(drafting, tokenizer, alone, drafts):
    """A token that breaks the model, which no tokenizer gives; later its pages are others'."""
    parameters, router_bias = take_apart(drafting)
    embedding_WD = parameters["embedding"].at[310].set(jnp.nan)
    model = put_together(skeleton_of(drafting.model), parameters | {"embedding": embedding_WD}, router_bias)
    engine, request = Engine(model, tokenizer, speculative=drafts, **SHAPE), Request(prompt_of(20, seed=9), GREEDY, 30)
    beside, broken = Client(engine, request), Client(engine, Request([310] * 60, Sampling(1.0), 40))
    work(engine)
    assert beside.token_ids == alone(request)
    assert broken.finish == "error" and not broken.token_ids and "NaN" in broken.events[-1].message
    for seed in range(90, 96):
        request = Request(prompt_of(50, seed=seed), GREEDY, 40)
        assert answer(engine, request).token_ids == alone(request)


def test_to_the_last_position_of_the_model(engine, alone):
    request = Request(prompt_of(60, seed=11), Sampling(1.0, 0, 1.0, seed=1), 68)
    assert answer(engine, request).token_ids == alone(request)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [1] * 100, "max_new_tokens": 29}, "100 tokens and max_new_tokens=29 need 129 .*positions=128"),
        ({"token_ids": []}, "nothing to continue"),
        ({"token_ids": [1, 320]}, "out of the vocabulary, which are 0 to 319"),
        ({"token_ids": [-1]}, "out of the vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"logprobs": 21}, "logprobs=21 must be between 0 and 20"),
        ({"sample_index": -1}, "sample_index=-1 must be between 0 and 4294967295"),
    ],
)
def test_what_can_never_be_answered_is_refused_at_once(engine, change, message):
    with pytest.raises(EngineError, match=message) as caught:
        engine.submit(dataclasses.replace(Request([1], GREEDY, 5), **change), print)
    assert caught.value.exit_code == 2 and engine.statistics().waiting == 0


def test_what_does_not_fit_the_cache_and_who_cannot_even_wait_are_refused(drafting, tokenizer):
    engine = Engine(drafting, tokenizer, slots=1, cache_tokens=100, page_size=16, most_waiting=2)
    with pytest.raises(EngineError, match="90 tokens and max_new_tokens=7 need 97 positions, and the cache holds 96"):
        engine.submit(Request([1] * 90, GREEDY, 7), print)
    clients = [Client(engine, Request([1] * 90, GREEDY, 6)) for _ in range(2)]
    with pytest.raises(EngineBusy, match="2 requests wait already, and most_waiting=2"):
        Client(engine, Request([1], GREEDY, 6))
    engine.cancel(clients[0].ticket)
    engine.cancel(clients[1].ticket)
    assert engine.step() and not engine.step()
    assert [client.finish for client in clients] == ["cancelled"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"cache_tokens": 15}, "cache_tokens=15 must be at least page_size=16"),
        ({"speculative": -1}, "speculative=-1 must be at least 0"),
    ],
)
def test_an_engine_that_cannot_work_is_refused(drafting, tokenizer, change, message):
    with pytest.raises(EngineError, match=message):
        Engine(drafting, tokenizer, **SHAPE | change)


def test_no_drafts_without_an_mtp_module(model, tokenizer):
    with pytest.raises(EngineError, match="0 for a model without MTP module"):
        Engine(model, tokenizer, speculative=1)


def test_a_thread_serves_others_until_it_is_stopped(engine, alone):
    requests = [Request(prompt_of(20, seed=seed), GREEDY, 30) for seed in range(6)]
    stop, ended, results = threading.Event(), [threading.Event() for _ in requests], [[] for _ in requests]

    def serve(index: int) -> None:
        def on_event(event: Event) -> None:
            results[index] += event.token_ids
            if event.finish:
                ended[index].set()
            if index == 0:
                raise ConnectionError("gone")

        engine.submit(requests[index], on_event)

    worker = threading.Thread(target=engine.run, args=(stop,))
    worker.start()
    clients = [threading.Thread(target=serve, args=(index,)) for index in range(6)]
    for client in clients:
        client.start()
    assert all(event.wait(60) for event in ended)
    endless = Client(engine, Request(prompt_of(1), Sampling(1.0, 0, 1.0), 127, frozenset()))
    stop.set()
    worker.join(60)
    assert not worker.is_alive()
    # A client that raises is gone; the others are served.
    assert len(results[0]) < 30 and results[1:] == [alone(request) for request in requests[1:]]
    assert endless.finish in ("cancelled", "stop", "length")
    engine.check()
    assert engine.statistics().pages_used == 0
    with pytest.raises(EngineError, match="the engine has stopped"):
        engine.submit(requests[0], print)


def test_a_device_that_fails_ends_every_request(drafting, tokenizer, monkeypatch):
    engine = Engine(drafting, tokenizer, **SHAPE)
    clients = [Client(engine, Request([1] * 20, Sampling(1.0, 0, 1.0, seed=2), 40)) for _ in range(5)]
    while not clients[0].ticket.generated:
        engine.step()
    monkeypatch.setattr(engine._device, "prefill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert [client.finish for client in clients] == ["error"] * 5
    assert clients[0].token_ids == clients[0].ticket.generated
    engine.check()
    with pytest.raises(EngineError, match="the engine has failed: division by zero"):
        engine.submit(clients[0].request, print)
