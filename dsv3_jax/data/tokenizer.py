"""Byte-level BPE with DeepSeek-V3's pre-tokenizer and special tokens, and the reading of any tokenizer.json.

A tokenizer made or loaded here never turns text into special tokens: a document that spells one is encoded as
ordinary text, and only ids put a special token into a stream.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3_jax.config import ConfigError
from dsv3_jax.data.documents import DocumentSource
from dsv3_jax.data.errors import DataError

# DeepSeek's spelling: fullwidth bars (U+FF5C) and U+2581 between words, not the ASCII of the paper.
SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
# What other tokenizers call them. The order is the order of preference.
BEGINNING = (SPECIAL_TOKENS[0], "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<s>")
END = (SPECIAL_TOKENS[1], "<|end_of_text|>", "<|endoftext|>", "<eos>", "</s>")
PADDING = (SPECIAL_TOKENS[2], "<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]")
FILL_IN_THE_MIDDLE = (
    SPECIAL_TOKENS[3:6],
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
PLACED_BY_ID = frozenset((*SPECIAL_TOKENS, *BEGINNING, *END, *PADDING, *sum(FILL_IN_THE_MIDDLE, ())))
CONTROL_TOKEN = re.compile(r"<[|｜].+[|｜]>")

# The three splits of DeepSeek-V3's tokenizer.json, each applied to the pieces of the one before.
DIGITS = r"\p{N}{1,3}"
CJK_AND_KANA = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"  # one mark and the letters after it: .join, _name
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"  # a word with the space before it
    r"| ?[\p{P}\p{S}]+[\r\n]*"  # punctuation with the line ends after it
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # blank lines; indentation, its last space left to the word
)

TRAINING_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens the data pipeline places; None where the tokenizer has none."""

    beginning: int | None
    end: int
    padding: int | None
    fim_begin: int | None
    fim_hole: int | None
    fim_end: int | None


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` ids, the special tokens first; the same texts give the same one.

    Raises:
        ConfigError: `vocabulary` has no room for the bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIAL_TOKENS)
    if vocabulary < least:
        raise ConfigError(
            f"model.vocabulary={vocabulary} must be at least {least} to train a tokenizer: "
            f"{len(alphabet)} bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (DIGITS, CJK_AND_KANA, WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _without_injection(tokenizer)


def training_texts(source: DocumentSource) -> Iterator[str]:
    """Texts to train a tokenizer on: documents in a fixed random order until `TRAINING_BYTES` are reached."""
    size = 0
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        text = source[index].text
        yield text
        size += len(text.encode())
        if size >= TRAINING_BYTES:
            return


def load_tokenizer(path: str | Path, vocabulary: int) -> Tokenizer:
    """Read a tokenizer.json as it is written.

    Never through transformers' AutoTokenizer, which since version 5 rebuilds DeepSeek's pre-tokenizer wrongly.

    Raises:
        DataError: no such file, or not a tokenizer.
        ConfigError: it has ids that `vocabulary` rows of embedding cannot hold.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"data.tokenizer='{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"data.tokenizer='{path}' is not a tokenizer.json: {error}") from error
    return tokenizer_from(text, f"data.tokenizer='{path}'", vocabulary)


def tokenizer_from(text: str, name: str, vocabulary: int) -> Tokenizer:
    """`load_tokenizer` of the text of a tokenizer.json; errors call it `name`."""
    try:
        content = json.loads(text)
        # Many files (DeepSeek's too) flag <think>, FIM and chat tokens as not special, which would let text spell them.
        for token in content.get("added_tokens", []):
            spelled = token["content"]
            token["special"] = token["special"] or spelled in PLACED_BY_ID or bool(CONTROL_TOKEN.fullmatch(spelled))
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DataError(f"{name} is not a tokenizer.json: {str(error).splitlines()[0]}") from error
    ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if ids > vocabulary:
        raise ConfigError(f"model.vocabulary={vocabulary} must be at least {ids}, the number of ids of {name}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _without_injection(tokenizer)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text` alone: no special token, neither added nor spelled by the text."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Find the special tokens by DeepSeek's names, else by those of other common tokenizers.

    Raises:
        DataError: there is no token that ends a text.
    """
    # Added tokens only: an ordinary entry of the vocabulary that looks like one could come out of text.
    ids = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    beginning, end, padding = (
        next((ids[name] for name in names if name in ids), None) for names in (BEGINNING, END, PADDING)
    )
    if end is None:
        raise DataError(f"the tokenizer has no end-of-text token: it needs one of {' '.join(END)}")
    family = next((names for names in FILL_IN_THE_MIDDLE if all(name in ids for name in names)), ())
    fim_begin, fim_hole, fim_end = (ids[name] for name in family) if family else (None, None, None)
    return SpecialTokens(beginning, end, padding, fim_begin, fim_hole, fim_end)


def _without_injection(tokenizer: Tokenizer) -> Tokenizer:
    # The library's name means: encode special tokens in text like any other text. It is not stored in the file.
    tokenizer.encode_special_tokens = True
    return tokenizer
