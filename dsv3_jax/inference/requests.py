"""What clients and the engine tell each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dsv3_jax.errors import UserError
from dsv3_jax.inference.sampling import Sampling

MOST_LOGPROBS = 20
"""Alternatives to a token whose log probabilities can be asked for."""
Finish = Literal["stop", "length", "cancelled", "error"]


class EngineError(UserError, ValueError):
    """A request that this engine can never answer."""

    exit_code = 2


class EngineBusy(UserError, RuntimeError):
    """Too many requests wait already; later there may be room."""


@dataclass(frozen=True)
class Request:
    """One prompt to be continued."""

    token_ids: list[int]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end it, beside the one that ends a document; the one that came is part of the result."""
    logprobs: int | None = None
    """Log probabilities of every token and of so many of the most probable ones in its place; None: of none."""
    sample_index: int = 0
    """Several samples of one prompt with one seed differ by it."""
    routed_experts: bool = False
    """Tell the experts that made each token."""


@dataclass(frozen=True)
class Limits:
    """What an engine can answer at all."""

    words: int
    positions: int
    pages: int
    page_size: int

    def pages_for(self, request: Request) -> int:
        return -(-(len(request.token_ids) + request.max_new_tokens) // self.page_size)

    def check(self, request: Request) -> None:
        """Raises EngineError for a request beyond them."""
        prompt, new = len(request.token_ids), request.max_new_tokens
        if not prompt:
            raise EngineError("there is nothing to continue: the prompt needs at least one token")
        if min(request.token_ids) < 0 or max(request.token_ids) >= self.words:
            raise EngineError(f"the prompt has ids out of the vocabulary, which are 0 to {self.words - 1}")
        if new < 1:
            raise EngineError(f"max_new_tokens={new} must be at least 1")
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
            raise EngineError(f"logprobs={request.logprobs} must be between 0 and {MOST_LOGPROBS}")
        if not 0 <= request.sample_index < 2**32:
            raise EngineError(f"sample_index={request.sample_index} must be between 0 and {2**32 - 1}")
        needed = f"a prompt of {prompt} tokens and max_new_tokens={new} need {prompt + new} positions"
        if prompt + new > self.positions:
            raise EngineError(f"{needed}, and the model has model.maximum_positions={self.positions}")
        if self.pages_for(request) > self.pages:
            held = self.pages * self.page_size
            raise EngineError(f"{needed}, and the cache holds {held}, in pages of {self.page_size}")


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities, before penalties and temperature."""

    logprob: float
    """Of the token."""
    top: list[tuple[int, float]]
    """The most probable ids and theirs, the most probable first."""


RoutedExperts = list[list[list[int]]]
"""[tokens, MoE layers, experts a token]: what made each token. These are the experts that the main model chose, in its
routers' order, at the position before the token, in the pass that predicted it: the newest token's position, a
draft's that stayed, or for the first token the prompt's last. An MTP module's experts are not among them."""


class Event(NamedTuple):
    """More of one request's result."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    """One a token, if they were asked for."""
    finish: Finish | None
    """Why nothing follows; None: more follows."""
    message: str | None = None
    """What the error was."""
    routed_experts: RoutedExperts | None = None
    """One a token, if they were asked for."""


@dataclass(eq=False)
class Ticket:
    """A request on its way. Everything but the request itself is the engine's own."""

    request: Request
    on_event: Callable[[Event], None]
    keys: list[bytes]
    """Of the prompt's whole pages."""
    cancelled: bool = False
    slot: int | None = None
    pages: tuple[int, ...] = ()
    prefilled: int = 0
    """Tokens of the prompt that are in the cache."""
    kept: int = 0
    """Pages that others may use as well."""
    generated: list[int] = field(default_factory=list)

    @property
    def row(self) -> int:
        """The slot, of a ticket that has one."""
        assert self.slot is not None
        return self.slot

    @property
    def is_decoding(self) -> bool:
        return self.prefilled == len(self.request.token_ids)

    @property
    def left(self) -> int:
        return self.request.max_new_tokens - len(self.generated)


class Statistics(NamedTuple):
    """Counters of an engine; from `prompt_tokens` on since it was made."""

    running: int
    waiting: int
    pages_used: int
    pages_free: int
    pages_cached: int
    prompt_tokens: int
    """Of requests that got a slot, the reused ones included."""
    reused_tokens: int
    """Prompt tokens that another request had left in the cache."""
    generated_tokens: int
    passes: int
    """Of the model over a slot's newest token and drafts; each first token comes from its prompt instead."""
    accepted: list[int]
    """Of drafts 1, 2, ..., in how many of the passes it stayed."""
