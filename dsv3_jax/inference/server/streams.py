"""The engine's events, which come from its thread, as texts in the server's loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from starlette.concurrency import run_in_threadpool
from tokenizers import Tokenizer

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.reasoning import ReasoningStream, Split, opens_thinking
from dsv3_jax.inference.requests import EngineBusy, EngineError, Event, Request, RoutedExperts, Ticket
from dsv3_jax.inference.server.errors import BUSY, FAILED, STOPPING, RequestError
from dsv3_jax.inference.server.token_texts import Scored, Unscored
from dsv3_jax.inference.stopping import StopWatch
from dsv3_jax.inference.streaming import TextStream


class Delta(NamedTuple):
    """What one choice of a reply grows by."""

    choice: int
    text: str = ""
    reasoning: str = ""
    logprobs: list[Scored | Unscored] = []
    """Empty where nobody asked. The token that ends a text has one, and no text."""
    routed_experts: RoutedExperts = []
    """Likewise."""
    tokens: int = 0
    """Generated, the one that ends the text included."""
    finish: Literal["stop", "length"] | None = None


class Reply:
    """The text of one choice out of its tokens: cut at stop strings, and in a chat divided from the reasoning,
    in which stop strings end nothing."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        stop: Sequence[str],
        include_stop: bool,
        chat_prompt: Sequence[int] | None = None,
    ):
        """`chat_prompt`: the prompt of a chat; None for the continuation of a text."""
        self._stream: TextStream | ReasoningStream = TextStream(tokenizer)
        if chat_prompt is not None:
            self._stream = ReasoningStream(tokenizer, opens_thinking(tokenizer, chat_prompt))
        self._watch, self._each, self._stop_ids = StopWatch(stop, include_stop), bool(stop), stop_ids

    def add(self, event: Event, choice: int) -> Delta:
        """What an event of the engine, one that is no error, shows; its `finish` is set where the text ends."""
        ids, finish = event.token_ids, event.finish
        assert finish in (None, "stop", "length")
        split, read = Split(), 0
        # Where a text may end it, one token at a time: those after its end are none of this reply's.
        for part in [[token] for token in ids] if self._each else [ids]:
            read += len(part)
            # Its spelling is no part of the text, whether or not the tokenizer calls it special.
            ends = finish == "stop" and read == len(ids) and bool(part) and part[-1] in self._stop_ids
            split += self._shown(self._stream.add(part[:-1] if ends else part))
            if self._watch.found is not None:
                finish = "stop"
                break
        if finish and self._watch.found is None:
            split += self._shown(self._stream.finish())
            split += Split("", self._watch.finish())
            finish = "stop" if self._watch.found is not None else finish
        scored = [Scored(token, *of_token) for token, of_token in zip(ids[:read], event.logprobs or [], strict=False)]
        routed_experts = (event.routed_experts or [])[:read]
        return Delta(choice, split.answer, split.reasoning, [*scored], routed_experts, read, finish)

    def _shown(self, piece: str | Split) -> Split:
        reasoning, answer = ("", piece) if isinstance(piece, str) else piece
        return Split(reasoning, self._watch.add(answer))


def by_token(event: Event) -> Iterator[Event]:
    """An event of several tokens as one of each, so that a stream tells which text each token has made."""
    for place in range(len(event.token_ids)):
        one, is_last = slice(place, place + 1), place == len(event.token_ids) - 1
        yield Event(
            event.token_ids[one],
            event.logprobs and event.logprobs[one],
            event.finish if is_last else None,
            routed_experts=event.routed_experts and event.routed_experts[one],
        )


class Generation:
    """All choices of one request, from the engine's queue to their last deltas."""

    def __init__(self, engine: Engine, replies: Sequence[Reply]):
        """To be made in the server's loop."""
        self._engine, self._replies = engine, replies
        self._tickets: dict[int, Ticket] = {}
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def start(self, requests: Sequence[Request]) -> None:
        """Submit one request a choice.

        Raises:
            RequestError: the engine's queue is full, or a request can never fit.
        """
        # In a thread: the engine may hold its lock for as long as a pass of the model takes.
        await run_in_threadpool(self._submit, requests)

    def _submit(self, requests: Sequence[Request]) -> None:
        try:
            for choice, request in enumerate(requests):
                self._tickets[choice] = self._engine.submit(request, self._receiver(choice))
        except EngineBusy as error:
            self.cancel()
            raise RequestError(str(error), status=BUSY, code="queue_full") from error
        except EngineError as error:
            self.cancel()
            raise RequestError(str(error), code="context_length_exceeded") from error

    def _receiver(self, choice: int) -> Callable[[Event], None]:
        def receive(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))
            except RuntimeError:  # the loop has ended, and with it whoever waited
                pass

        return receive

    async def deltas(self) -> AsyncIterator[Delta]:
        """Until every choice has ended.

        Raises:
            RequestError: the engine failed, or is stopping.
        """
        running = set(range(len(self._replies)))
        while running:
            choice, event = await self._events.get()
            if choice not in running:
                continue  # what was on its way when a stop string ended the text
            if event.finish == "error":
                raise RequestError(event.message or "the engine failed", status=FAILED)
            if event.finish == "cancelled":
                raise RequestError(event.message or "the server is stopping", status=STOPPING)
            for part in [event] if event.routed_experts is None else by_token(event):
                delta = self._replies[choice].add(part, choice)
                if delta.finish:
                    running.discard(choice)
                    ticket = self._tickets.pop(choice)
                    if event.finish is None:
                        self._engine.cancel(ticket)
                yield delta
                if delta.finish:
                    break

    def fail(self, message: str) -> None:
        """From any thread: end with an error."""
        self._receiver(next(iter(self._tickets), 0))(Event([], None, "error", message))

    def cancel(self) -> None:
        """Let go of what still runs; harmless where nothing does."""
        while self._tickets:
            _, ticket = self._tickets.popitem()
            self._engine.cancel(ticket)
