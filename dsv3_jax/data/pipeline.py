"""Documents in, batches out: shuffle, fill in the middle, tokenise, pack, shuffle the rows.

A batch is a dict of int32 arrays [batch_size, sequence_length + 1], in training of the rows that a process needs:
    tokens        inputs are [:, :-1] and labels [:, 1:]
    segment_ids   the document a token belongs to, counted from 1 in its row (all 1 unless data.isolate_documents);
                  0 is padding
    positions     0, 1, 2, ... in the row, or in the document's piece of it with data.isolate_documents
    learnt        of chats only (chat_rows.py): 1 for tokens to be predicted, 0 for those of prompts
Every document stands as [beginning] text [end] in the stream.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import grain
import numpy as np
from tokenizers import Tokenizer

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.data.documents import Document, DocumentSource
from dsv3_jax.data.fill_in_the_middle import cut_for_fill_in_the_middle
from dsv3_jax.data.packing import PackedRows, overlapping_rows, segments_and_positions
from dsv3_jax.data.tokenizer import SpecialTokens, encode, special_tokens

RowBlocks = dict[int, np.ndarray]
"""Some rows of a batch: arrays [rows, sequence_length + 1] by the number of their first row."""

# Documents tokenised ahead of the training step, in a thread: the tokenizers library releases the interpreter lock.
READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)

# A document is many rows long. Without a second shuffle they would fill whole batches, and the gradient of a batch
# would be that of one document.
ROWS_SHUFFLED = 1024


class StreamedBatches(Iterator[dict[str, RowBlocks]]):
    """Endless batches of rows from several streams.

    Of each batch the rows of some of the streams, as blocks by their first row. `get_state()` fits JSON and counts only
    what has been consumed: another iterator that `set_state` gives it continues token for token. `close()` ends its
    threads.
    """

    def __init__(self, streams: Mapping[int, grain.DatasetIterator], rows_a_stream: int):
        """`streams`: by their number, the iterators over `rows_a_stream` rows each."""
        self._streams, self._rows = streams, rows_a_stream

    def fields(self, rows: Any) -> dict[str, np.ndarray]:
        """The arrays of a batch, of what a stream's iterator gave."""
        raise NotImplementedError

    def __next__(self) -> dict[str, RowBlocks]:
        batch: dict[str, RowBlocks] = {}
        for stream, rows in self._streams.items():
            for name, block in self.fields(next(rows)).items():
                batch.setdefault(name, {})[stream * self._rows] = block
        return batch

    def get_state(self) -> dict[str, Any]:
        return {str(stream): rows.get_state() for stream, rows in self._streams.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """`state` may hold more streams than these."""
        for stream, rows in self._streams.items():
            rows.set_state(state[str(stream)])

    def close(self) -> None:
        for rows in self._streams.values():
            rows.close()


class TrainingBatches(StreamedBatches):
    """Batches of shuffled rows of documents; `config.seed` and `data.streams` decide everything.

    Raises:
        DataError, ConfigError: as `training_rows`.
    """

    def __init__(
        self, source: DocumentSource, tokenizer: Tokenizer, config: Config, streams: Iterable[int] | None = None
    ):
        self._end, self._isolate = special_tokens(tokenizer).end, config.data.isolated
        streams = range(config.data.streams) if streams is None else streams
        super().__init__(
            {stream: iter(_shuffled_rows(source, tokenizer, config, stream)) for stream in streams},
            config.training.batch_size // config.data.streams,
        )

    def fields(self, rows: Any) -> dict[str, np.ndarray]:
        segment_ids_BS, positions_BS = segments_and_positions(rows, self._end, self._isolate)
        return {"tokens": rows, "segment_ids": segment_ids_BS, "positions": positions_BS}


def _shuffled_rows(source: DocumentSource, tokenizer: Tokenizer, config: Config, stream: int) -> grain.IterDataset:
    """Arrays [batch_size / streams, sequence_length + 1]: one stream's rows of each batch."""
    rows = training_rows(source, tokenizer, config, stream)
    shuffled = grain.experimental.WindowShuffleIterDataset(rows, window_size=ROWS_SHUFFLED, seed=config.seed)
    return shuffled.batch(config.training.batch_size // config.data.streams)


def training_rows(source: DocumentSource, tokenizer: Tokenizer, config: Config, stream: int = 0) -> grain.IterDataset:
    """Endless rows [sequence_length + 1] cut from one stream's documents, reshuffled and cut anew every epoch.

    Raises:
        DataError: the tokenizer has no end-of-text token.
        ConfigError: fill in the middle is asked for and the tokenizer has no tokens for it.
    """
    special, rate = special_tokens(tokenizer), config.data.fill_in_the_middle_rate
    if rate > 0 and special.fim_begin is None:
        raise ConfigError(
            f"data.fill_in_the_middle_rate={rate} needs fill-in-the-middle tokens, which this tokenizer lacks: use 0"
        )

    def tokenise(document: Document, random: np.random.Generator) -> np.ndarray:
        return training_tokens(document.text, tokenizer, special, rate, random)

    documents = grain.MapDataset.source(source).seed(config.seed).shuffle()
    if config.data.streams > 1:
        documents = documents[stream :: config.data.streams]
    if not len(documents):
        raise ConfigError(f"data.streams={config.data.streams} is more than there are documents, {len(source)}")
    tokenised = documents.repeat().random_map(tokenise).to_iter_dataset(READ_AHEAD)
    return PackedRows(tokenised, config.training.sequence_length + 1)


def validation_batches(source: DocumentSource, tokenizer: Tokenizer, config: Config) -> Iterator[dict[str, np.ndarray]]:
    """One pass in order, without shuffling or fill in the middle; the same batches every time.

    Rows overlap by one token, so each token of the stream but the very first is predicted exactly once: the labels to
    count are those with segment_ids[:, 1:] > 0. The last row and the last batch are padded.

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """
    special, training = special_tokens(tokenizer), config.training
    padding = special.end if special.padding is None else special.padding
    documents = (_framed(encode(tokenizer, document.text), special) for document in source)
    rows = overlapping_rows(documents, training.sequence_length + 1)
    while batch := list(islice(rows, training.batch_size)):
        tokens_BS = np.full((training.batch_size, training.sequence_length + 1), padding, np.int32)
        real_BS = np.zeros(tokens_BS.shape, bool)
        for index, row in enumerate(batch):
            tokens_BS[index, : len(row)] = row
            real_BS[index, : len(row)] = True
        segment_ids_BS, positions_BS = segments_and_positions(tokens_BS, special.end, config.data.isolated)
        yield {
            "tokens": tokens_BS,
            "segment_ids": np.where(real_BS, segment_ids_BS, 0),
            "positions": np.where(real_BS, positions_BS, 0),
        }


def validation_bytes(source: DocumentSource) -> bytes:
    """The text that the predicted validation tokens stand for, for comparison with general-purpose compressors."""
    return b"".join(document.predicted.encode() for document in source)


def training_tokens(
    text: str, tokenizer: Tokenizer, special: SpecialTokens, rate: float, random: np.random.Generator
) -> np.ndarray:
    """int32 tokens of one document, with probability `rate` in the order prefix, suffix, middle."""
    pieces = cut_for_fill_in_the_middle(text, rate, random)
    if pieces is None:
        return _framed(encode(tokenizer, text), special)
    prefix, suffix, middle = (encode(tokenizer, piece) for piece in (pieces.prefix, pieces.suffix, pieces.middle))
    return _framed([special.fim_begin, *prefix, special.fim_hole, *suffix, special.fim_end, *middle], special)


def _framed(ids: Sequence[int | None], special: SpecialTokens) -> np.ndarray:
    beginning = [] if special.beginning is None else [special.beginning]
    return np.array([*beginning, *ids, special.end], np.int32)
