"""/v1/completions: texts or token ids, continued; with echo, and log probabilities of the prompt as well."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from dsv3_jax.data.tokenizer import encode
from dsv3_jax.inference.completion import prompt_ids
from dsv3_jax.inference.server.errors import RequestError
from dsv3_jax.inference.server.protocol import CompletionRequest, Settings
from dsv3_jax.inference.server.service import Prepared, Service
from dsv3_jax.inference.server.streams import Delta
from dsv3_jax.inference.server.token_texts import Scored, TokenTexts, Unscored


class CompletionShape:
    """How /v1/completions writes its choices."""

    prefix = "cmpl"
    whole = chunk = "text_completion"

    def __init__(self, texts: TokenTexts, settings: Settings):
        self._texts, self._logprobs = texts, settings.logprobs is not None
        self._routed_experts = settings.routed_experts
        self._offsets: dict[int, int] = {}

    def opening(self, choice: int) -> list[dict[str, Any]]:
        return []

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        anything = delta.text or delta.logprobs or delta.routed_experts or delta.finish
        return [self.choice(delta)] if anything else []

    def choice(self, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            offset = self._offsets.get(delta.choice, 0)
            logprobs = self._texts.legacy(delta.logprobs, offset)
            widths = sum(self._texts.width(token.token_id) for token in delta.logprobs)
            self._offsets[delta.choice] = offset + widths
        choice = {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}
        return choice | ({"routed_experts": delta.routed_experts} if self._routed_experts else {})


async def prepare(service: Service, wanted: CompletionRequest) -> Prepared:
    """The prompts' ids, and what is shown before their continuations.

    Raises:
        RequestError: a prompt without tokens, or prompts and continuations that do not fit.
    """
    prompts = await run_in_threadpool(_ids, service, wanted)
    settings = wanted.settings
    shown = await _echoed(service, wanted, prompts) if wanted.echo else []
    return Prepared(prompts, settings, CompletionShape(service.texts, settings), shown)


def _ids(service: Service, wanted: CompletionRequest) -> list[list[int]]:
    prompts = []
    for prompt in wanted.prompts:
        ids = prompt if isinstance(prompt, list) else encode_prompt(service, prompt, wanted.add_special_tokens)
        if not ids:
            raise RequestError("a prompt is empty: it needs at least one token", "prompt")
        prompts.append(ids)
    return prompts


def encode_prompt(service: Service, text: str, add_special_tokens: bool) -> list[int]:
    return prompt_ids(service.tokenizer, text) if add_special_tokens else encode(service.tokenizer, text)


async def _echoed(service: Service, wanted: CompletionRequest, prompts: Sequence[list[int]]) -> list[Delta]:
    """The prompts as the beginnings of their choices."""
    deltas = []
    for index, (prompt, ids) in enumerate(zip(wanted.prompts, prompts, strict=True)):
        service.check_room(ids, wanted.settings.max_tokens)
        text = prompt if isinstance(prompt, str) else service.tokenizer.decode(ids, skip_special_tokens=True)
        scored: list[Scored | Unscored] = []
        if wanted.settings.logprobs is not None:
            scored = [Unscored(ids[0]), *await service.scored(ids, wanted.settings.logprobs)]
        for sample in range(wanted.settings.choices):
            deltas.append(Delta(index * wanted.settings.choices + sample, text, logprobs=scored))
    return deltas


async def nothing_generated(choices: int) -> AsyncIterator[Delta]:
    """What max_tokens=0 asks for."""
    for choice in range(choices):
        yield Delta(choice, finish="length")
