"""An engine that says what it is told to, and servers on top of it."""

import itertools
import threading
import time
from collections import deque

import pytest
from starlette.testclient import TestClient

from dsv3_jax.data.tokenizer import encode, special_tokens
from dsv3_jax.inference.chat import chat_template
from dsv3_jax.inference.requests import EngineBusy, EngineError, Event, Statistics, TokenLogprobs
from dsv3_jax.inference.server.app import make_app
from dsv3_jax.inference.server.running import Server, bound
from dsv3_jax.inference.server.service import Service
from dsv3_jax.inference.server.token_texts import Scored

CONTEXT = 200
ROUTING = {"first_layer": 1, "layers": 2, "experts": 7, "groups": 1, "experts_per_token": 2}


def experts_of(token):
    """[layers, experts a token]"""
    return [[token % 7, token % 5], [token % 3, token % 2]]


class FakeEngine:
    """Answers every request with the same tokens, one event for each `piece` of them, from a thread of its own."""

    def __init__(self, tokenizer, answer: str = "naïve 漢字🙂"):
        self.tokenizer, self.end = tokenizer, special_tokens(tokenizer).end
        self.answer = [*encode(tokenizer, answer), self.end]
        self.piece, self.error, self.room = 1, None, 1000
        self.requests, self.cancelled, self.stop = [], [], threading.Event()
        self._changed, self._left, self._running = threading.Condition(), deque(), {}
        self._numbers = itertools.count()

    def submit(self, request, on_event):
        if len(request.token_ids) + request.max_new_tokens > CONTEXT:
            raise EngineError("the fake engine has no room")
        with self._changed:
            if len(self._left) >= self.room:
                raise EngineBusy("too many wait")
            ticket = next(self._numbers)
            self.requests.append(request)
            self._left.append([ticket, request, on_event, self.answer, 0])
            self._changed.notify()
        return ticket

    def cancel(self, ticket):
        with self._changed:
            self.cancelled.append(ticket)

    def run(self, stop):
        while not stop.is_set():
            with self._changed:
                if not self._left:
                    self._changed.wait(0.02)
                    continue
                work = self._left.popleft()
            if not self._step(*work):
                work[4] += self.piece
                with self._changed:
                    self._left.append(work)
        for _, _, on_event, _, _ in self._left:
            on_event(Event([], None, "cancelled", "the engine has stopped"))

    def _step(self, ticket, request, on_event, ids, start):
        if ticket in self.cancelled:
            on_event(Event([], None, "cancelled"))
            return True
        if self.error:
            on_event(Event([], None, "error", self.error))
            return True
        end = min(start + self.piece, request.max_new_tokens)
        part = ids[start:end]
        stops = next((index for index, token in enumerate(part) if token in request.stop_ids), None)
        part = part if stops is None else part[: stops + 1]
        finish = "stop" if stops is not None else "length" if end == request.max_new_tokens else None
        logprobs = None
        if request.logprobs is not None:
            logprobs = [TokenLogprobs(-0.5, [(token, -0.5), (5, -2.0)][: request.logprobs]) for token in part]
        routed_experts = [experts_of(token) for token in part] if request.routed_experts else None
        on_event(Event(part, logprobs, finish, routed_experts=routed_experts))
        return finish is not None

    def statistics(self):
        return Statistics(len(self._left), 0, 3, 4, 5, 60, 10, 70, 40, [20, 10])


def fake_score(token_ids, top):
    return [Scored(token, -1.0 - index, [(token, -0.25)][:top]) for index, token in enumerate(token_ids[1:])]


@pytest.fixture
def engine(tokenizer):
    engine = FakeEngine(tokenizer)
    worker = threading.Thread(target=engine.run, args=[engine.stop])
    worker.start()
    yield engine
    engine.stop.set()
    worker.join()


@pytest.fixture
def service(engine, tokenizer):
    special = {"bos_token": tokenizer.id_to_token(0), "eos_token": tokenizer.id_to_token(1)}
    return Service(
        engine,
        tokenizer,
        "small",
        CONTEXT,
        frozenset([special_tokens(tokenizer).end]),
        chat=chat_template(None, tokenizer),
        score=fake_score,
        special_texts=special,
        routing=ROUTING,
    )


@pytest.fixture
def client(service):
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def server(service, engine):
    return Server(service, engine.stop, seconds_to_end=0.2)


@pytest.fixture
def address(server):
    """Of a server that runs in a thread, where there are no signals."""
    listening = bound("127.0.0.1", 0)
    worker = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    worker.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    worker.join()
