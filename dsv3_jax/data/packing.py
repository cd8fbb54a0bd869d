"""Packing: documents joined into one stream of tokens, cut into rows, with segments and positions in each row."""

from collections.abc import Iterable, Iterator
from typing import Any

import grain
import numpy as np


class PackedRows(grain.IterDataset[np.ndarray]):
    """Rows cut from the concatenation of documents; no token is lost, added or padded.

    Parent: an endless dataset of int32 arrays, one a document. Elements: int32 [row_length].

    grain's own ConcatThenSplitIterDataset (0.2.18) loses a document when its state has been through JSON, as in a
    checkpoint: it compares a tuple with the list that comes back. This state is the parent's before the current
    document, and how many of that document's tokens are used.
    """

    def __init__(self, parent: grain.IterDataset[np.ndarray], row_length: int):
        super().__init__(parent)
        self._row_length = row_length

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        return _PackedRowsIterator(self._parent.__iter__(), self._row_length)


class _PackedRowsIterator(grain.DatasetIterator[np.ndarray]):
    def __init__(self, parent: grain.DatasetIterator[np.ndarray], row_length: int):
        super().__init__(parent)
        self._row_length = row_length
        self._before_document = parent.get_state()
        self._document = np.zeros(0, np.int32)
        self._used = 0

    def __next__(self) -> np.ndarray:
        self._assert_not_closed()
        row = np.empty(self._row_length, np.int32)
        filled = 0
        while filled < len(row):
            if self._used == len(self._document):
                self._before_document = self._parent.get_state()
                self._document = next(self._parent)
                self._used = 0
            piece = self._document[self._used : self._used + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._used += len(piece)
        return row

    def get_state(self) -> dict[str, Any]:
        return {"before_document": self._before_document, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._before_document, self._used = state["before_document"], state["used"]
        self._parent.set_state(self._before_document)
        self._document = next(self._parent)


def overlapping_rows(documents: Iterable[np.ndarray], row_length: int) -> Iterator[np.ndarray]:
    """Rows of the concatenation of `documents`, each starting on the last token of the row before; the last is short.

    So every token but the very first follows another in exactly one row.
    """
    stream = np.zeros(0, np.int32)
    for document in documents:
        stream = np.concatenate([stream, document])
        while len(stream) >= row_length:
            yield stream[:row_length]
            stream = stream[row_length - 1 :]
    if len(stream) > 1:
        yield stream


def segments_and_positions(tokens_BS: np.ndarray, end: int, isolate: bool) -> tuple[np.ndarray, np.ndarray]:
    """int32 segment ids, from 1, and positions, from 0, of the tokens of each row.

    Isolated, a new segment begins after each `end` token, which nothing but the end of a document holds, and positions
    restart there and at the start of the row. Otherwise a row is one segment.
    """
    place_BS = np.broadcast_to(np.arange(tokens_BS.shape[1], dtype=np.int32), tokens_BS.shape)
    if not isolate:
        return np.ones(tokens_BS.shape, np.int32), place_BS.copy()
    starts_BS = np.ones(tokens_BS.shape, bool)
    starts_BS[:, 1:] = tokens_BS[:, :-1] == end
    start_place_BS = np.maximum.accumulate(np.where(starts_BS, place_BS, 0), axis=1)
    return np.cumsum(starts_BS, axis=1, dtype=np.int32), place_BS - start_place_BS
