"""A model's responses to problems: prompts through its chat template, samples from the engine, texts with tags."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from dsv3_jax.inference.chat import ChatTemplate
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.reasoning import OPENING, opens_thinking
from dsv3_jax.inference.requests import EngineError, Event, Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.stopping import stop_ids, turn_end
from dsv3_jax.tasks.problem import Problem

PAGE_SIZE = 16
"""Small, as prompts and responses of tasks are: a request reserves whole pages."""


@dataclass(frozen=True)
class Response:
    """What a model said to one problem."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    """As `response_text` has it."""
    ended: bool
    """Whether the model ended it; otherwise it was cut off."""


class Responder:
    """Asks an engine for responses."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, chat: ChatTemplate, ends: Collection[int]):
        """`ends`: the tokens that end a response, see `response_ends`."""
        self._engine, self._tokenizer, self._chat, self._ends = engine, tokenizer, chat, frozenset(ends)

    def respond(
        self, problems: Sequence[Problem], sampling: Sampling, max_new_tokens: int, samples: int = 1
    ) -> list[list[Response]]:
        """`samples` responses to each problem; the same ones at every call.

        Raises:
            EngineError: a prompt and its response do not fit the model or the engine's cache, or the logits are NaN.
        """
        prompts = [self._chat.token_ids([{"role": "user", "content": problem.prompt}]) for problem in problems]
        found: list[list[Event]] = []
        for number, prompt in enumerate(prompts):
            for sample in range(samples):
                found.append([])
                # An index of its own for all of them: one seed would draw alike for every problem's first sample.
                index = number * samples + sample
                request = Request(prompt, sampling, max_new_tokens, self._ends, sample_index=index)
                while self._engine.statistics().waiting >= WAITING:
                    self._engine.step()
                self._engine.submit(request, found[-1].append)
        while self._engine.step():
            pass
        responses = [self._response(prompts[number // samples], events) for number, events in enumerate(found)]
        return [responses[start : start + samples] for start in range(0, len(responses), samples)]

    def _response(self, prompt: list[int], events: list[Event]) -> Response:
        if events[-1].finish not in ("stop", "length"):
            raise EngineError(events[-1].message or "the engine ended a response before its end")
        ids = [token for event in events for token in event.token_ids]
        text = response_text(self._tokenizer, prompt, ids, self._ends)
        return Response(prompt, ids, text, events[-1].finish == "stop")


WAITING = 64
"""Requests that wait at one time: an engine has a limit."""


def response_ends(files: dict[str, str] | None, tokenizer: Tokenizer, chat: ChatTemplate) -> frozenset[int]:
    """The tokens that end a response: the model's own ends, and the one that its chat template ends a turn with.

    `files`: as in `stop_ids`.
    """
    return stop_ids(files, tokenizer) | {turn_end(chat, tokenizer)}


def response_text(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int], ends: Collection[int]
) -> str:
    """The text of a response as a `Problem` verifies it.

    Tags that are special tokens are spelled, thinking that the prompt has opened is opened, and the token that ended
    the response is left out. Any other special token is spelled, too: it is no part of a well-formed response.
    """
    said = token_ids[:-1] if token_ids and token_ids[-1] in ends else token_ids
    text = tokenizer.decode(list(said), skip_special_tokens=False)
    return OPENING + text if opens_thinking(tokenizer, prompt_ids) else text
