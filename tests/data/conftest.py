import dataclasses
import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer

from configs.tiny import config as tiny
from dsv3_jax.config import Config
from dsv3_jax.data.documents import Document
from dsv3_jax.data.tokenizer import train_tokenizer

WORDS = [
    "def",
    "return",
    "self",
    "list",
    "range",
    "print",
    "value",
    "index",
    "for",
    "in",
    "if",
    "else",
    "import",
    "yield",
    "data",
    "token",
    "expert",
    "layer",
]


def make_documents(lengths: list[int], seed: int = 1) -> list[Document]:
    """Distinct documents of the given numbers of words."""
    choice = random.Random(seed).choice
    return [
        Document(f"{number}.py", f"# {number}\n" + " ".join(choice(WORDS) for _ in range(length)))
        for number, length in enumerate(lengths)
    ]


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Empty, one-word, short and long documents: some many rows long, some many to a row."""
    return make_documents([0, 1, 2, 3, 5, 8, 13, 300, 4, 40, 7, 90, 1, 25, 2, 600, 11])


@pytest.fixture(scope="session")
def tokenizer(documents: list[Document]) -> Tokenizer:
    return train_tokenizer([document.text for document in documents], 400)


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """`make_config(batch_size, sequence_length, seed=..., **data)`."""

    def make(batch_size: int, sequence_length: int, seed: int = 0, **data: object) -> Config:
        training = dataclasses.replace(tiny.training, batch_size=batch_size, sequence_length=sequence_length)
        fields = {"fill_in_the_middle_rate": 0.0, **data}
        return dataclasses.replace(tiny, seed=seed, training=training, data=dataclasses.replace(tiny.data, **fields))

    return make
