"""Where a text ends before the model ends it: at strings and at tokens the caller names."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from dsv3_jax.data.tokenizer import special_tokens
from dsv3_jax.inference.chat import ChatTemplate
from dsv3_jax.inference.chat_rendering import ChatError
from dsv3_jax.inference.sampling import SamplingError


@dataclass(frozen=True)
class Stops:
    """What ends a row."""

    strings: tuple[str, ...] = ()
    ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if "" in self.strings:
            raise SamplingError("a stop string is empty: it needs at least one character")

    def place(self, token_ids: Sequence[int]) -> int | None:
        """Where the first stop id stands among these tokens; None: nowhere."""
        return next((place for place, token in enumerate(token_ids) if token in self.ids), None)


class StopWatch:
    """Passes the text of one row on as it comes, up to the first stop string.

    The first is the one complete first, and of several complete with the same character the longest. How the text is
    cut into pieces changes nothing.
    """

    def __init__(self, strings: Sequence[str], include: bool = False):
        """`include`: the stop string itself belongs to the text."""
        self._strings = tuple(strings)
        self._include = include
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def add(self, piece: str) -> str:
        """What can be shown now, possibly nothing: an end that a stop string could begin with is held back."""
        if self.found is not None:
            return ""
        text = self._held + piece
        # A match cannot begin before what is held: that would have been held back as its beginning.
        ends = [(text.find(string) + len(string), -len(string), string) for string in self._strings if string in text]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return text[:end] if self._include else text[: end - len(self.found)]
        shown = len(text) - max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What is still held back, once no more text comes."""
        rest, self._held = self._held, ""
        return rest


def stop_ids(files: Mapping[str, str] | None, tokenizer: Tokenizer) -> frozenset[int]:
    """The token that ends a document, and those with which a model's own settings end an answer.

    `files`: texts of the Hugging Face directory that the model came from; generation_config.json is looked at.
    """
    ids = {special_tokens(tokenizer).end}
    try:
        settings = json.loads((files or {}).get("generation_config.json", "{}"))
    except ValueError:
        settings = {}
    named = settings.get("eos_token_id") if isinstance(settings, dict) else None
    for token in named if isinstance(named, list) else [named]:
        if isinstance(token, int) and tokenizer.id_to_token(token) is not None:
            ids.add(token)
    return frozenset(ids)


def turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> int:
    """The token that ends an assistant's turn: the special one that the template writes after it, else the one that
    ends a document, without which a model that learns from chats would never learn to stop.

    Raises:
        ChatError: the template leaves out what the assistant says.
    """
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    spoken = template.token_ids(chat, continue_final_message=True)
    whole = template.token_ids(chat, add_generation_prompt=False)
    if whole[: len(spoken)] != spoken:
        raise ChatError("the chat template does not write an assistant's message as it is")
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    after = whole[len(spoken) : len(spoken) + 1]
    return after[0] if after and after[0] in special else special_tokens(tokenizer).end


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that is a beginning of `string`, less than all of it."""
    longest = min(len(string) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)
