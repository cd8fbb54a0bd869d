"""Chats in, batches out: through the chat template, packed whole into rows, with a mask of what is learnt.

What an assistant said is learnt in the context in which it will be said: after exactly the prompt that the model's chat
template writes for the messages before it, up to the token that ends the turn. Every turn of an assistant is an example
of its own, as templates leave out the thinking of earlier turns.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from tokenizers import Tokenizer

from dsv3_jax.config import Config
from dsv3_jax.data.chats import Chat, ChatSource
from dsv3_jax.data.errors import DataError
from dsv3_jax.data.pipeline import READ_AHEAD, StreamedBatches
from dsv3_jax.inference.chat import ChatTemplate
from dsv3_jax.inference.chat_rendering import ChatError
from dsv3_jax.inference.stopping import turn_end

ROWS_PACKED = 64
"""Rows filled at one time, each chat going where it leaves the least room."""


class Example(NamedTuple):
    """int32 [tokens] each."""

    tokens: np.ndarray
    learnt: np.ndarray
    """1 for the response and its end, 0 for the prompt."""


class ChatEncoder:
    """From chats to examples."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, config: Config):
        """Raises ChatError: a template that no assistant's turn comes out of."""
        self._template, self._end = template, turn_end(template, tokenizer)
        self._longest, self._overlong = config.training.sequence_length + 1, config.data.overlong_chats

    def __call__(self, chat: Chat) -> list[Example]:
        """An example for every turn of an assistant; none of a chat that is left out for its length.

        Raises:
            DataError: no turn of an assistant, messages that make no prompt, or a chat longer than a row.
        """
        turns = [index for index, message in enumerate(chat.messages) if message.get("role") == "assistant"]
        if not turns:
            raise DataError(f"{chat.place} has no message of role assistant: there is nothing to learn from it")
        examples = [self._example(chat, turn) for turn in turns]
        return [example for example in examples if self._fits(example, chat)]

    def _example(self, chat: Chat, turn: int) -> Example:
        before, spoken = chat.messages[:turn], chat.messages[: turn + 1]
        try:
            prompt = self._template.token_ids(before)
            whole = self._template.token_ids(spoken, continue_final_message=True)
        except ChatError as error:
            raise DataError(f"{chat.place}: {error}") from error
        if whole[: len(prompt)] != prompt:
            raise DataError(
                f"{chat.place}: what the chat template writes before the assistant's message {turn} is not the prompt "
                "that it writes to ask for it"
            )
        tokens = np.array([*whole, self._end], np.int32)
        return Example(tokens, (np.arange(len(tokens)) >= len(prompt)).astype(np.int32))

    def _fits(self, example: Example, chat: Chat) -> bool:
        if len(example.tokens) <= self._longest:
            return True
        if self._overlong == "refuse":
            learnt = int(example.learnt.sum())
            raise DataError(
                f"{chat.place}: a prompt of {len(example.tokens) - learnt} tokens and a response of {learnt} are "
                f"longer than a row: set training.sequence_length={len(example.tokens) - 1} or more, or "
                "data.overlong_chats=leave_out"
            )
        return False


class ChatBatches(StreamedBatches):
    """Batches of rows packed with shuffled chats; `config.seed` and `data.streams` decide everything.

    Every epoch is another order of all chats; only at its border do rows hold chats of both.

    Raises:
        DataError: a first chat that cannot be learnt from, or none that fits a row.
    """

    def __init__(self, source: ChatSource, encoder: ChatEncoder, config: Config, streams: Iterable[int] | None = None):
        if not any(encoder(chat) for chat in source):
            length = config.training.sequence_length
            raise DataError(f"none of {len(source)} chats fits a row of training.sequence_length={length}: raise it")
        rows = config.training.batch_size // config.data.streams
        streams = range(config.data.streams) if streams is None else streams
        super().__init__(
            {stream: iter(_training_rows(source, encoder, config, stream).batch(rows)) for stream in streams}, rows
        )

    def fields(self, rows: Any) -> dict[str, np.ndarray]:
        return _fields(rows)


def chat_validation_batches(
    source: ChatSource, encoder: ChatEncoder, config: Config
) -> Iterator[dict[str, np.ndarray]]:
    """One pass; the same batches every time. Every token of a response is predicted exactly once.

    The last batch is padded with empty rows. Raises DataError as a `ChatEncoder` does.
    """
    chats = grain.MapDataset.source(source).to_iter_dataset(READ_AHEAD)
    rows = iter(_packed(chats, encoder, config, shuffled=False))
    size = config.training.batch_size
    while batch := list(itertools.islice(rows, size)):
        filled = {name: np.stack([row[name] for row in batch]) for name in batch[0]}
        yield _fields({name: np.pad(array, ((0, size - len(batch)), (0, 0))) for name, array in filled.items()})


def _training_rows(source: ChatSource, encoder: ChatEncoder, config: Config, stream: int) -> grain.IterDataset:
    chats = grain.MapDataset.source(source).seed(config.seed).shuffle()[stream :: config.data.streams]
    if not len(chats):
        raise DataError(f"data.streams={config.data.streams} is more than there are chats, {len(source)}")
    return _packed(chats.repeat().to_iter_dataset(READ_AHEAD), encoder, config, shuffled=True)


def _packed(chats: grain.IterDataset, encoder: ChatEncoder, config: Config, shuffled: bool) -> grain.IterDataset:
    def encoded(chat: Chat) -> list[dict[str, np.ndarray]]:
        return [example._asdict() for example in encoder(chat)]

    examples = grain.experimental.FlatMapIterDataset(chats.map(encoded), _Each())
    length = config.training.sequence_length + 1
    return grain.experimental.BestFitPackIterDataset(
        examples,
        length_struct={"tokens": length, "learnt": length},
        num_packing_bins=ROWS_PACKED,
        seed=config.seed,
        shuffle_bins=shuffled,
        meta_features=("learnt",),
    )


class _Each(grain.experimental.FlatMapTransform):
    def flat_map(self, element: list) -> list:
        return element


def _fields(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {
        "tokens": "tokens",
        "tokens_segment_ids": "segment_ids",
        "tokens_positions": "positions",
        "learnt": "learnt",
    }
    return {ours: rows[name].astype(np.int32) for name, ours in names.items()}
