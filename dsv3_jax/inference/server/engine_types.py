"""What the server and the engine say to each other."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from dsv3_jax.errors import UserError
from dsv3_jax.inference.sampling import Sampling


class EngineError(UserError, ValueError):
    exit_code = 2


class EngineBusy(UserError, RuntimeError):
    pass


class TokenLogprobs(NamedTuple):
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Request:
    token_ids: list[int]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    sample_index: int = 0


class Event(NamedTuple):
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: Literal["stop", "length", "cancelled", "error"] | None
    message: str | None = None


class Statistics(NamedTuple):
    running: int
    waiting: int
    pages_used: int
    pages_free: int
    pages_cached: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    passes: int
    accepted: list[int]
