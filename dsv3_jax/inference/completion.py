"""Texts continued by a model: what infer.py prints and a training run shows at its end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from dsv3_jax.data.tokenizer import encode, special_tokens
from dsv3_jax.inference.chat import ChatTemplate
from dsv3_jax.inference.generation import Chunk, Generator
from dsv3_jax.inference.reasoning import CLOSING, OPENING, ReasoningStream, Split, opens_thinking
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.stopping import StopWatch
from dsv3_jax.inference.streaming import TextStream
from dsv3_jax.model.transformer import Transformer


@dataclass(frozen=True)
class Completion:
    """One prompt and how it went on."""

    prompt: str
    reasoning: str
    """In a chat, what the model thought before it answered, if it did."""
    text: str
    """The continuation or answer alone, special tokens left out."""
    token_ids: list[int]
    """Every generated token, the one that ends a document included."""
    tokens_per_second: float
    """Speed after the first token, compilation not counted; 0 where there is only one token."""
    tokens_per_pass: float
    """Tokens that a pass of the model brought, over all prompts; 1 without speculation."""
    acceptance: list[float]
    """Share of the passes in which draft 1, draft 2, ... stayed, over all prompts; empty without speculation."""
    finish_reason: Literal["stop", "length"]
    """stop: the model ended the document, or a stop string came; length: max_new_tokens were generated."""


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    max_new_tokens: int,
    on_piece: Callable[[int, str], None] | None = None,
    *,
    speculative: int = 0,
    stop: Sequence[str] = (),
    chat: ChatTemplate | None = None,
) -> list[Completion]:
    """Continue all prompts together as one batch.

    Args:
        on_piece: `on_piece(row, text)` is called with the text of a prompt's continuation as it comes.
        speculative: drafts of the MTP module a pass.
        stop: texts that end a continuation, and are not part of it.
        chat: the prompts are what a user says; without, they are beginnings of documents.

    Raises:
        GenerationError: a prompt too long for the model, or drafts of a model without MTP module.
        ChatError: a template that cannot be rendered.
        DataError: the tokenizer has no token that ends a document.
    """
    end = special_tokens(tokenizer).end

    def ids_of(prompt: str) -> list[int]:
        return chat.token_ids([{"role": "user", "content": prompt}]) if chat else prompt_ids(tokenizer, prompt)

    ids = [ids_of(prompt) for prompt in prompts]
    show = on_piece or (lambda *_: None)
    rows = [_Row(tokenizer, of_row, stop, chat is not None) for of_row in ids]
    drafted = Drafted(speculative)
    for chunk in Generator(model, tokenizer, speculative).generate(ids, sampling, max_new_tokens):
        drafted.add(chunk)
        for index, (row, new_ids) in enumerate(zip(rows, chunk.token_ids, strict=True)):
            if text := row.add(new_ids, chunk.seconds):
                show(index, text)
        if all(row.stopped for row in rows):
            break
    for index, row in enumerate(rows):
        if text := row.finish():
            show(index, text)
    return [row.completion(prompt, end, drafted) for row, prompt in zip(rows, prompts, strict=True)]


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt as the beginning of a document in training: the beginning token, if there is one, then the text.

    An empty text without a beginning token becomes the end token, which in training stands before a document.
    """
    special = special_tokens(tokenizer)
    beginning = [] if special.beginning is None else [special.beginning]
    return [*beginning, *encode(tokenizer, text)] or [special.end]


class Drafted:
    """How the drafts of a generation fared."""

    def __init__(self, drafts: int):
        self._tokens, self._passes, self._accepted = 0, 0, [0] * drafts

    def add(self, chunk: Chunk) -> None:
        # Prefill's token follows no draft.
        if chunk.seconds:
            self._tokens += sum(map(len, chunk.token_ids))
            self._passes += chunk.passes
            self._accepted = [sum(pair) for pair in zip(self._accepted, chunk.accepted, strict=True)]

    @property
    def tokens_per_pass(self) -> float:
        return self._tokens / self._passes if self._passes else 1.0

    @property
    def acceptance(self) -> list[float]:
        return [count / max(self._passes, 1) for count in self._accepted]


class _Row:
    """One prompt's continuation as it comes."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str], chat: bool):
        self._stream: TextStream | ReasoningStream = TextStream(tokenizer)
        if chat:
            self._stream = ReasoningStream(tokenizer, opens_thinking(tokenizer, prompt))
        self._watch, self._each = StopWatch(stop), bool(stop)
        self._split, self._token_ids, self._seconds = Split(), list[int](), 0.0

    @property
    def stopped(self) -> bool:
        return self._watch.found is not None

    def add(self, new_ids: list[int], seconds: float) -> str:
        """The text that these tokens show."""
        if self.stopped or not new_ids:
            return ""
        self._seconds += seconds
        shown = ""
        # Where a text may end it, one token at a time: those after its end are none of this row's.
        for part in [[token] for token in new_ids] if self._each else [new_ids]:
            self._token_ids += part
            shown += self._show(self._stream.add(part))
            if self.stopped:
                break
        return shown

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        shown = self._show(self._stream.finish())
        rest = self._watch.finish()
        self._split += Split("", rest)
        return shown + rest

    def completion(self, prompt: str, end: int, drafted: "Drafted") -> Completion:
        ended = self.stopped or self._token_ids[-1] == end
        return Completion(
            prompt,
            self._split.reasoning,
            self._split.answer,
            self._token_ids,
            (len(self._token_ids) - 1) / self._seconds if self._seconds else 0.0,
            drafted.tokens_per_pass,
            drafted.acceptance,
            "stop" if ended else "length",
        )

    def _show(self, piece: str | Split) -> str:
        reasoning, answer = ("", piece) if isinstance(piece, str) else piece
        answer = self._watch.add(answer)
        shown = ""
        if reasoning and not self._split.reasoning:
            shown += f"{OPENING}\n"
        shown += reasoning
        if answer and not self._split.answer and (reasoning or self._split.reasoning):
            shown += CLOSING
        self._split += Split(reasoning, answer)
        return shown + answer
