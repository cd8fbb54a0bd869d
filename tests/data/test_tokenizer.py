import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from dsv3_jax.config import ConfigError
from dsv3_jax.data.documents import Document
from dsv3_jax.data.errors import DataError
from dsv3_jax.data.tokenizer import (
    SPECIAL_TOKENS,
    SpecialTokens,
    encode,
    load_tokenizer,
    special_tokens,
    train_tokenizer,
    training_texts,
)

ADVERSARIAL = (
    "",
    " ",
    "\x00\x01\x7f",
    "\r\n\r\r\n\n \t \n",
    "  leading and trailing  ",
    "".join(map(chr, range(256))),
    "".join(map(chr, (*range(256, 0xD800, 97), *range(0xE000, 0x110000, 997), 0x10FFFF))),
    "e\u0301 \u202eabc\u202c 👩‍👩‍👧‍👦 नमस्ते ٣٤٥ 一二三カナ",
    "1234567890" * 50,
    "=" * 1000 + "\n" + " " * 1000,
    "\ufeff\ufffd\ufffe",
    "".join(SPECIAL_TOKENS),
    "<｜end▁of▁sentence｜>x<think><｜fim▁hole｜> </think>",
)


def gpt2_like(*names: str, special: bool) -> Tokenizer:
    """A foreign byte-level tokenizer of the bytes alone with added tokens."""
    tokenizer = Tokenizer(
        models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return tokenizer


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_any_text_round_trips_and_becomes_no_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(index >= len(SPECIAL_TOKENS) for index in ids)


def test_special_tokens_come_first_and_decode_to_their_names(tokenizer: Tokenizer) -> None:
    assert special_tokens(tokenizer) == SpecialTokens(0, 1, 2, 3, 4, 5)
    assert [tokenizer.id_to_token(index) for index in range(10)] == [
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<\uff5c\u2581pad\u2581\uff5c>",
        "<\uff5cfim\u2581begin\uff5c>",
        "<\uff5cfim\u2581hole\uff5c>",
        "<\uff5cfim\u2581end\uff5c>",
        "<\uff5cUser\uff5c>",
        "<\uff5cAssistant\uff5c>",
        "<think>",
        "</think>",
    ]
    assert tokenizer.decode([8, 9], skip_special_tokens=False) == "<think></think>"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("x = foo.bar(12345)", ["x", " =", " foo", ".bar", "(", "123", "45", ")"]),
        ("  return self._x;\n\n\tpass", [" ", " return", " self", "._", "x", ";\n\n", "\tpass"]),
        ("\n\n    if", ["\n\n", "   ", " if"]),
        ("你好world 3カナ!", ["你好", "world", " ", "3", "カナ", "!"]),
        ("don't  \r\n", ["don", "'t", "  \r\n"]),
    ],
)
def test_pre_tokenizer_splits_as_deepseek(tokenizer: Tokenizer, text: str, pieces: list[str]) -> None:
    found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in found] == pieces


def test_training_is_deterministic_and_learns_words(documents: list[Document], tokenizer: Tokenizer) -> None:
    texts = [document.text for document in documents]
    again = train_tokenizer(iter(texts), 400)
    assert again.to_str() == tokenizer.to_str()
    assert tokenizer.get_vocab_size() <= 400
    assert len(encode(tokenizer, " return value")) == 2


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.vocabulary=265 must be at least 266"):
        train_tokenizer(["text"], 265)
    assert train_tokenizer(["text text"], 266).get_vocab_size() == 266


def test_training_texts_stop_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = [Document(str(number), f"{number:010d}") for number in range(100)]
    assert sorted(training_texts(source)) == [document.text for document in source]
    monkeypatch.setattr("dsv3_jax.data.tokenizer.TRAINING_BYTES", 95)
    some = list(training_texts(source))
    assert len(some) == len(set(some)) == 10
    assert some == list(training_texts(source))
    assert some != [document.text for document in source[:10]]


def test_save_and_load(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    loaded = load_tokenizer(path, 400)
    for text in ADVERSARIAL:
        assert encode(loaded, text) == encode(tokenizer, text)


def test_load_refuses_in_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    for content in (
        None,
        b"{}",
        b"[1]",
        b"\xff\x00",
        b"not json",
        b'{"added_tokens": [{}]}',
        b'{"model": {"type": "X"}}',
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match="data.tokenizer=.*tokenizer.json") as caught:
            load_tokenizer(path, 400)
        assert "\n" not in str(caught.value)
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    ids = tokenizer.get_vocab_size()
    with pytest.raises(ConfigError, match=f"model.vocabulary=300 must be at least {ids}"):
        load_tokenizer(path, 300)
    load_tokenizer(path, ids)


def test_tokens_a_file_flags_as_ordinary_cannot_be_spelled_by_text(tmp_path: Path) -> None:
    # DeepSeek's own file flags these so.
    names = (
        "<｜end▁of▁sentence｜>",
        "<｜fim▁begin｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁end｜>",
        "<think>",
        "<｜place▁holder｜>",
    )
    path = tmp_path / "tokenizer.json"
    foreign = gpt2_like(*names, "<table>", special=False)
    foreign.enable_truncation(4)
    path.write_text(foreign.to_str())
    loaded = load_tokenizer(path, 1000)
    assert all(index < 256 for index in encode(loaded, "text " + "".join(names)))
    assert len(encode(loaded, "longer than four")) == 16
    # A word of the vocabulary that no stream places by id stays a word.
    assert encode(loaded, "<table>") == [loaded.token_to_id("<table>")]
    assert json.loads(path.read_text())["truncation"] is not None


def test_special_tokens_of_other_tokenizers() -> None:
    gpt2 = gpt2_like("<|endoftext|>", special=True)
    assert special_tokens(gpt2) == SpecialTokens(None, 256, None, None, None, None)
    names = ("<s>", "</s>", "<pad>", "<|fim_middle|>", "<|fim_prefix|>", "<|fim_suffix|>")
    assert special_tokens(gpt2_like(*names, special=True)) == SpecialTokens(256, 257, 258, 260, 261, 259)
    partial = gpt2_like("</s>", "<|fim_middle|>", "<|fim_prefix|>", special=True)
    assert special_tokens(partial).fim_begin is None
    with pytest.raises(DataError, match="no end-of-text token"):
        special_tokens(gpt2_like("<s>", special=True))
