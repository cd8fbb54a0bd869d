"""Files of documents, read lazily: one class a format, each row a document.

Opening a file reads only what finding its rows takes; a text is read when asked for. Everything here pickles.
"""

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from dsv3_jax.data.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text and its name: the path relative to the corpus, with the line or row for files of many documents."""

    name: str
    text: str


class DocumentSource(Protocol):
    """Documents by number: a list, or `corpus.Documents`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...

    def __iter__(self) -> Iterator[Document]: ...


class DocumentFile(Protocol):
    """A file of `len(file)` documents."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str: ...

    def text(self, row: int) -> str: ...


class TextFile:
    """A UTF-8 text that is one document: the whole file, or its characters from `start` to `stop`."""

    def __init__(self, path: Path, name: str, start: int = 0, stop: int | None = None):
        self._path, self._name, self._start, self._stop = path, name, start, stop

    def __len__(self) -> int:
        return 1

    def name(self, row: int) -> str:
        return self._name

    def text(self, row: int) -> str:
        return _decode(_read(self._path), str(self._path))[self._start : self._stop]

    def split(self, share: float) -> tuple["TextFile", "TextFile"]:
        """Head and tail; the tail is `share` of the characters, moved back to the start of a line if there is one."""
        text = self.text(0)
        wanted = int(len(text) * (1.0 - share))
        cut = text.rfind("\n", 0, wanted) + 1 or wanted
        if not 0 < cut < len(text):
            raise DataError(
                f"{self._path} is a single document of {len(text)} characters, too short to hold out "
                f"data.validation_share={share} of it"
            )
        head = TextFile(self._path, f"{self._name} (head)", 0, cut)
        return head, TextFile(self._path, f"{self._name} (tail)", cut)


class JsonLinesFile:
    """One JSON object a line, blank lines left out; found by an index of byte offsets.

    The first document is checked here, the others when they are read.
    """

    def __init__(self, path: Path, name: str, field: str):
        self._path, self._name, self._field = path, name, field
        self._offsets, self._lines = array("q"), array("q")
        offset = 0
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        if self._offsets:
            self.text(0)

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, row: int) -> str:
        return f"{self._name}:{self._lines[row]}"

    def text(self, row: int) -> str:
        with _open(self._path) as file:
            file.seek(self._offsets[row])
            line = file.readline()
        return self._field_of(line, f"{self._path}:{self._lines[row]}")

    def _field_of(self, line: bytes, place: str) -> str:
        try:
            value = json.loads(_decode(line, place))
        except json.JSONDecodeError as error:
            raise DataError(f"{place} is not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(value, dict):
            raise DataError(f"{place} holds a JSON {type(value).__name__}, not an object with field {self._field!r}")
        if self._field not in value:
            raise DataError(f"{place} has no field {self._field!r} (data.text_field); its fields: {_list(value)}")
        return _text(value[self._field], f"field {self._field!r} of {place}")


class ParquetFile:
    """One document a row, read by row group.

    A shuffled read of one document reads its whole row group, so row groups of about a thousand rows or fewer suit.
    """

    def __init__(self, path: Path, name: str, column: str):
        import pyarrow
        import pyarrow.parquet

        self._path, self._name, self._column = path, name, column
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
        with file:
            if column not in file.schema_arrow.names:
                names = _list(file.schema_arrow.names)
                raise DataError(f"{path} has no column {column!r} (data.text_field); its columns: {names}")
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._group_ends = list(accumulate(rows))
        if len(self):
            self.text(0)

    def __len__(self) -> int:
        return self._group_ends[-1] if self._group_ends else 0

    def name(self, row: int) -> str:
        return f"{self._name}:{row}"

    def text(self, row: int) -> str:
        group = bisect_right(self._group_ends, row)
        first_row = self._group_ends[group - 1] if group else 0
        value = _row_group(self._path, group, self._column)[row - first_row].as_py()
        return _text(value, f"column {self._column!r} of {self._path}:{row}")


@lru_cache(maxsize=4)
def _row_group(path: Path, group: int, column: str) -> Any:
    """One column of one row group; the few kept serve reads in order."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place} holds {type(value).__name__}, not text")
    # JSON can spell half a surrogate pair, which no tokenizer takes; it becomes U+FFFD.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}") from error


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _read(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _list(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
