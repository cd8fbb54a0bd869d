"""A reply divided into the thinking between <think> and </think> and the answer, as it comes."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from dsv3_jax.data.tokenizer import SPECIAL_TOKENS
from dsv3_jax.inference.streaming import TextStream

OPENING, CLOSING = SPECIAL_TOKENS[8:10]


class Split(NamedTuple):
    """Texts to append to the reasoning and to the answer that came before."""

    reasoning: str = ""
    answer: str = ""

    def __add__(self, other: tuple) -> "Split":
        return Split(self.reasoning + other[0], self.answer + other[1])


class ReasoningStream:
    """Divides the token ids of a reply; the texts are those of `TextStream`.

    Where the tags are special tokens, ids alone are tags: text that spells one is text, and a tag that has nothing to
    open or close is left out. In other tokenizers the tags are text, and `ReasoningText` finds them.

    Args:
        thinking: the prompt has opened the thinking already, see `opens_thinking`.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool = False):
        self._tokenizer = tokenizer
        self._opening, self._closing = _tag_ids(tokenizer)
        self._by_id = self._opening is not None and self._closing is not None
        self._stream = TextStream(tokenizer)
        self._thinking = thinking
        self._text = ReasoningText(thinking)

    @property
    def thinking(self) -> bool:
        """Whether the next token is part of the reasoning, as far as is known."""
        return self._thinking if self._by_id else self._text.thinking

    def add(self, token_ids: Sequence[int]) -> Split:
        """What these tokens complete."""
        if not self._by_id:
            return self._text.add(self._stream.add(token_ids))
        split, start = Split(), 0
        for index, token in enumerate(token_ids):
            if token in (self._opening, self._closing):
                # The parts are texts of their own: bytes of a character cut off before a tag never meet the rest.
                split += self._part(self._stream.add(token_ids[start:index]) + self._stream.finish())
                self._stream = TextStream(self._tokenizer)
                self._thinking = token == self._opening
                start = index + 1
        return split + self._part(self._stream.add(token_ids[start:]))

    def finish(self) -> Split:
        """What was held back."""
        rest = self._stream.finish()
        return self._part(rest) if self._by_id else self._text.add(rest) + self._text.finish()

    def _part(self, text: str) -> Split:
        return Split(reasoning=text) if self._thinking else Split(answer=text)


class ReasoningText:
    """Divides the text of a reply where the tags are text, which may come in pieces of any size.

    A reply thinks at its beginning or not at all: <think> opens as the first text after whitespace, which then is left
    out, and the first </think> after it closes. Tags anywhere else are text. What could become a tag is held back, and
    whitespace at the beginning.

    Args:
        thinking: the prompt has opened the thinking already; a <think> that begins the reply is still taken as a tag.
    """

    def __init__(self, thinking: bool = False):
        self.thinking = thinking
        self._at_beginning = True
        self._held = ""

    def add(self, piece: str) -> Split:
        """What this piece completes."""
        text, self._held = self._held + piece, ""
        if self._at_beginning:
            first = text.lstrip()
            if OPENING.startswith(first):  # nothing but whitespace so far, or a beginning of the tag, or all of it
                if first != OPENING:
                    self._held = text
                    return Split()
            self._at_beginning = False
            if first.startswith(OPENING):
                self.thinking = True
                text = first.removeprefix(OPENING)
        if not self.thinking:
            return Split(answer=text)
        reasoning, closed, answer = text.partition(CLOSING)
        if closed:
            self.thinking = False
            return Split(reasoning, answer)
        held = next((size for size in range(len(CLOSING) - 1, 0, -1) if text.endswith(CLOSING[:size])), 0)
        self._held = text[len(text) - held :]
        return Split(reasoning=text[: len(text) - held])

    def finish(self) -> Split:
        """What was held back, which no tag came of."""
        text, self._held = self._held, ""
        return Split(reasoning=text) if self.thinking else Split(answer=text)


def opens_thinking(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends within thinking, as R1's do: <｜Assistant｜><think> and a line end."""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    last = next((index for index in reversed(range(len(prompt_ids))) if prompt_ids[index] in special), -1)
    opening, _ = _tag_ids(tokenizer)
    if opening is not None:
        return last >= 0 and prompt_ids[last] == opening
    # After the last special token stands what the assistant's turn begins with.
    text = tokenizer.decode(list(prompt_ids[last + 1 :]), skip_special_tokens=True).lstrip()
    return text.startswith(OPENING) and CLOSING not in text


def _tag_ids(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    ids = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return ids.get(OPENING), ids.get(CLOSING)
