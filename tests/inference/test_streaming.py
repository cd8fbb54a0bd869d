"""Streamed text is the whole text, in whole characters."""

import numpy as np
import pytest

from dsv3_jax.data.tokenizer import SPECIAL_TOKENS, encode, special_tokens, train_tokenizer
from dsv3_jax.inference.streaming import TextStream

TEXT = "naïve 漢字かな 🙂🙃 👩‍👩‍👧 e\u0301\n\tend"


@pytest.fixture(scope="module")
def byte_tokenizer():
    """No merges: every byte is a token, so every character beyond ASCII is spread over several."""
    return train_tokenizer(["a"], 256 + len(SPECIAL_TOKENS))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_are_the_text_in_whole_characters(byte_tokenizer, size):
    stream, ids = TextStream(byte_tokenizer), encode(byte_tokenizer, TEXT)
    assert len(ids) == len(TEXT.encode())
    pieces = [stream.add(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == TEXT and stream.finish() == ""


def test_a_character_comes_with_its_last_byte(byte_tokenizer):
    stream = TextStream(byte_tokenizer)
    assert [stream.add([token]) for token in encode(byte_tokenizer, "a漢b")] == ["a", "", "", "漢", "b"]


def test_bytes_that_become_no_character_are_shown_at_the_end(byte_tokenizer):
    stream = TextStream(byte_tokenizer)
    assert stream.add(encode(byte_tokenizer, "a漢")[:-1]) == "a"
    assert (stream.finish(), stream.finish()) == ("\ufffd", "")


def test_any_ids_at_all_give_the_text_of_the_whole(byte_tokenizer):
    random = np.random.default_rng(0)
    for _ in range(300):
        ids = random.integers(0, byte_tokenizer.get_vocab_size(), size=40).tolist()
        stream = TextStream(byte_tokenizer)
        pieces = [stream.add([token]) for token in ids] + [stream.finish()]
        assert "".join(pieces) == byte_tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_not_shown(byte_tokenizer):
    special, stream = special_tokens(byte_tokenizer), TextStream(byte_tokenizer)
    (letter,) = encode(byte_tokenizer, "x")
    assert stream.add([special.beginning, letter, special.fim_hole, letter, special.end]) + stream.finish() == "xx"
