"""Tokens as texts and bytes, and log probabilities in the two shapes of OpenAI's interface."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Scored(NamedTuple):
    """A token with its log probability and those of the most probable ones in its place, the most probable first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Unscored(NamedTuple):
    """A token without a log probability: a prompt's first one, which follows nothing."""

    token_id: int


class TokenTexts:
    """What each token of a tokenizer spells by itself."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self.special = {token.content: index for index, token in added.items() if token.special}
        self._special_ids = frozenset(self.special.values())
        self.known = frozenset(tokenizer.get_vocab(with_added_tokens=True).values())
        self._byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
        self._byte_of = _byte_of_character()

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; of one that the tokenizer does not have, none."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(self._byte_of[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # SentencePiece's single bytes
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        """As OpenAI spells them: a text, or 'bytes:' and the bytes of a part of a character, so that none are equal."""
        of_token = self.bytes_of(token)
        if not of_token:
            return f"token_id:{token}"
        try:
            return of_token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in of_token)

    def width(self, token: int) -> int:
        """Characters that a token adds to a text; one in several tokens counts with the first of them."""
        if token in self._special_ids:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.bytes_of(token))

    def legacy(self, tokens: Sequence[Scored | Unscored], offset: int) -> dict[str, list[Any]]:
        """The shape of /v1/completions. `offset`: where in the text the first token begins.

        The alternatives contain the token itself even where it is not among the most probable.
        """
        shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            scored = None if isinstance(token, Unscored) else token
            shape["tokens"].append(self.text_of(token.token_id))
            shape["token_logprobs"].append(finite(scored.logprob) if scored else None)
            shape["top_logprobs"].append(self._alternatives(scored) if scored else None)
            shape["text_offset"].append(offset)
            offset += self.width(token.token_id)
        return shape

    def chat(self, tokens: Sequence[Scored | Unscored]) -> dict[str, Any]:
        """The shape of /v1/chat/completions."""
        content = [
            self._entry(token.token_id, token.logprob)
            | {"top_logprobs": [self._entry(index, logprob) for index, logprob in token.top]}
            for token in tokens
            if isinstance(token, Scored)
        ]
        return {"content": content, "refusal": None}

    def _alternatives(self, token: Scored) -> dict[str, float]:
        alternatives: dict[str, float] = {}
        for index, logprob in (*token.top, (token.token_id, token.logprob)):
            alternatives.setdefault(self.text_of(index), finite(logprob))
        return alternatives

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text_of(token), "logprob": finite(logprob), "bytes": list(self.bytes_of(token))}


def finite(logprob: float) -> float:
    return float(logprob) if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable bytes stand for themselves, the others follow each other from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
