"""Text out of a stream of tokens, a character only when all its bytes are there."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of token ids as they come; special tokens are left out.

    A character whose bytes are spread over tokens is held back until the last of them. All pieces together are the
    text of all ids together.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete, possibly none."""
        self._ids.extend(token_ids)
        piece = "".join(self._stream.step(self._tokenizer, token) or "" for token in token_ids)
        self._shown += len(piece)
        return piece

    def finish(self) -> str:
        """What is still held back: bytes that became no character, each run of them as U+FFFD."""
        rest = self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._shown :]
        self._shown += len(rest)
        return rest
