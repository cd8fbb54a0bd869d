"""What all routes share: the engine, the tokenizer, the limits, and the requests that run."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from tokenizers import Tokenizer

from dsv3_jax.inference.chat import ChatTemplate
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.server.errors import STOPPING, RequestError
from dsv3_jax.inference.server.metrics import Metrics
from dsv3_jax.inference.server.protocol import Settings
from dsv3_jax.inference.server.replies import Shape
from dsv3_jax.inference.server.streams import Delta, Generation, Reply
from dsv3_jax.inference.server.token_texts import Scored, TokenTexts

MOST_BYTES = 32 * 2**20


@dataclass
class Prepared:
    """A request in the engine's terms."""

    prompts: list[list[int]]
    settings: Settings
    shape: Shape
    echoed: list[Delta]
    """What the choices begin with before anything is generated."""
    chat: bool = False

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.settings.choices


@dataclass
class Service:
    """One model, served."""

    engine: Engine
    tokenizer: Tokenizer
    name: str
    """Of the model."""
    context: int
    """Tokens that a prompt and its continuation may have together."""
    stop_ids: frozenset[int]
    """Tokens that end a text."""
    share: int | None = None
    """Of the context, what a request that names no number of tokens gets; None: all of it."""
    chat: ChatTemplate | None = None
    score: Callable[[Sequence[int], int], list[Scored]] | None = None
    """Log probabilities of all tokens but the first, each with so many alternatives. Called once at a time."""
    api_keys: tuple[str, ...] = ()
    """One of them has to come with a request; none: anybody may."""
    special_texts: dict[str, str] = field(default_factory=dict)
    """bos_token, eos_token and pad_token, those that there are."""
    routing: dict[str, int] = field(default_factory=dict)
    """The MoE layers, as /v1/models tells of them."""
    most_bytes: int = MOST_BYTES
    """Of a request's body."""
    failure: str | None = None
    """Why the engine no longer runs."""
    running: set[Generation] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self._scoring = asyncio.Lock()
        self.texts = TokenTexts(self.tokenizer)
        self.metrics = Metrics(self.engine.statistics)

    async def scored(self, prompt: Sequence[int], top: int) -> list[Scored]:
        """Raises RequestError where prompts cannot be scored."""
        if self.score is None:
            raise RequestError("log probabilities of a prompt are not supported by this server", "echo")
        # Whoever waits does so here, not in one of the few threads that all requests share.
        async with self._scoring:
            return await run_in_threadpool(self.score, prompt, top)

    def check_room(self, prompt: Sequence[int], max_tokens: int | None) -> None:
        """Raises RequestError, with the numbers, where a prompt and so many tokens do not fit."""
        needed = len(prompt) + (1 if max_tokens is None else max_tokens)
        if needed > self.context:
            asked = "leave no room for an answer" if max_tokens is None else f"and max_tokens={max_tokens} do not fit"
            message = f"{len(prompt)} tokens of prompt {asked}: the model's context has {self.context}"
            raise RequestError(message, "max_tokens" if max_tokens else None, code="context_length_exceeded")

    def tokens_left(self, prompt: Sequence[int]) -> int:
        """How long the answer to a prompt may become where the request does not say.

        The engine keeps room for all of it from the beginning: with the whole context for each, nothing would run
        beside one of them. A prompt that takes most of its share gets more than one.
        """
        share = self.context if self.share is None else self.share
        return min(self.context - len(prompt), max(share - len(prompt), share // 4, 1))

    async def started(self, prepared: Prepared) -> Generation:
        """All choices submitted to the engine.

        Raises:
            RequestError: one does not fit, too many wait already, or the engine has failed.
        """
        settings = prepared.settings
        stop_ids = self.stop_ids | settings.stop_ids
        replies, requests = list[Reply](), list[Request]()
        for prompt in prepared.prompts:
            self.check_room(prompt, settings.max_tokens)
            most = self.tokens_left(prompt) if settings.max_tokens is None else settings.max_tokens
            of_chat = prompt if prepared.chat else None
            for _ in range(settings.choices):
                replies.append(Reply(self.tokenizer, stop_ids, settings.stop, settings.include_stop, of_chat))
                asked = settings.logprobs, len(requests), settings.routed_experts
                requests.append(Request(prompt, settings.sampling, most, stop_ids, *asked))
        generation = Generation(self.engine, replies)
        self.running.add(generation)
        try:
            # Only now: `fail` from here on reaches this one, too.
            if self.failure is not None:
                raise RequestError(self.failure, status=STOPPING)
            await generation.start(requests)
        except BaseException:
            self.end(generation)
            raise
        return generation

    def end(self, generation: Generation) -> None:
        """Nobody waits for it any more."""
        self.running.discard(generation)
        generation.cancel()

    def fail(self, message: str) -> None:
        """The engine no longer runs: end what waits for it, and take nothing new. From any thread."""
        self.failure = message
        for generation in list(self.running):
            generation.fail(message)


async def after(echoed: list[Delta], deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    for delta in echoed:
        yield delta
    async for delta in deltas:
        yield delta
