"""Texts continued by a model: what infer.py prints and a training run shows at its end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tokenizers import Tokenizer

from dsv3_jax.data.tokenizer import encode, special_tokens
from dsv3_jax.inference.generation import Chunk, Generator
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.streaming import TextStream
from dsv3_jax.model.transformer import Transformer


@dataclass(frozen=True)
class Completion:
    """One prompt and how it went on."""

    prompt: str
    text: str
    """The continuation alone, special tokens left out."""
    token_ids: list[int]
    """Every generated token, the one that ends a document included."""
    tokens_per_second: float
    """Speed after the first token, compilation not counted; 0 where there is only one token."""
    tokens_per_pass: float
    """Tokens that a pass of the model brought, over all prompts; 1 without speculation."""
    acceptance: list[float]
    """Share of the passes in which draft 1, draft 2, ... stayed, over all prompts; empty without speculation."""
    finish_reason: Literal["stop", "length"]
    """stop: the model ended the document; length: max_new_tokens were generated."""


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    max_new_tokens: int,
    on_piece: Callable[[int, str], None] | None = None,
    speculative: int = 0,
) -> list[Completion]:
    """Continue all prompts together as one batch, with `speculative` drafts of the MTP module a pass.

    `on_piece(row, text)` is called with the text of a prompt's continuation as it comes.

    Raises:
        GenerationError: a prompt too long for the model.
        DataError: the tokenizer has no token that ends a document.
    """
    end = special_tokens(tokenizer).end
    rows = [_Row(TextStream(tokenizer)) for _ in prompts]

    def show(row: int, text: str) -> None:
        rows[row].pieces.append(text)
        if on_piece and text:
            on_piece(row, text)

    generator = Generator(model, tokenizer, speculative)
    drafted = Drafted(speculative)
    for chunk in generator.generate([prompt_ids(tokenizer, text) for text in prompts], sampling, max_new_tokens):
        for index, (row, new_ids) in enumerate(zip(rows, chunk.token_ids, strict=True)):
            if new_ids:
                row.token_ids += new_ids
                row.seconds += chunk.seconds
                show(index, row.stream.add(new_ids))
        drafted.add(chunk)
    for index, row in enumerate(rows):
        show(index, row.stream.finish())
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


@dataclass
class _Row:
    stream: TextStream
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def completion(self, prompt: str, end: int, drafted: Drafted) -> Completion:
        speed = (len(self.token_ids) - 1) / self.seconds if self.seconds else 0.0
        reason: Literal["stop", "length"] = "stop" if self.token_ids[-1] == end else "length"
        return Completion(
            prompt,
            "".join(self.pieces),
            self.token_ids,
            speed,
            drafted.tokens_per_pass,
            drafted.acceptance,
            reason,
        )
