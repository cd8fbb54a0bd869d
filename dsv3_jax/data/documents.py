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

    @property
    def predicted(self) -> str:
        """The part of the text that a model learns to write."""
        return self.text


class DocumentSource(Protocol):
    """Documents by number: a list, `corpus.Documents`, or one of `chats`."""

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


class JsonLines:
    """The objects of a file with one a line, blank lines left out; found by an index of byte offsets."""

    def __init__(self, path: Path):
        self._path = path
        self._offsets, self._lines = array("q"), array("q")
        offset = 0
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def line(self, row: int) -> int:
        """The number in the file, from 1, of object `row`."""
        return self._lines[row]

    def place(self, row: int) -> str:
        """What errors call object `row`."""
        return f"{self._path}:{self._lines[row]}"

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Raises DataError: the line is no object of JSON."""
        with _open(self._path) as file:
            file.seek(self._offsets[row])
            line = file.readline()
        try:
            value = json.loads(_decode(line, self.place(row)))
        except json.JSONDecodeError as error:
            raise DataError(f"{self.place(row)} is not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(value, dict):
            raise DataError(f"{self.place(row)} holds a JSON {type(value).__name__}, not an object with fields")
        return value

    def text(self, row: int, field: str, option: str) -> str:
        """The text in a field of object `row`; errors say that `option` names the field.

        Raises:
            DataError: as above, or the field is not there or holds no text.
        """
        value, place = self[row], self.place(row)
        if field not in value:
            raise DataError(f"{place} has no field {field!r} ({option}); its fields: {names_in(value)}")
        return text_of(value[field], f"field {field!r} of {place}")


class JsonLinesFile:
    """One document a line. The first one is checked here, the others when they are read."""

    def __init__(self, path: Path, name: str, field: str):
        self._objects, self._name, self._field = JsonLines(path), name, field
        if len(self):
            self.text(0)

    def __len__(self) -> int:
        return len(self._objects)

    def name(self, row: int) -> str:
        return f"{self._name}:{self._objects.line(row)}"

    def text(self, row: int) -> str:
        return self._objects.text(row, self._field, "data.text_field")


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
                names = names_in(file.schema_arrow.names)
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
        return text_of(value, f"column {self._column!r} of {self._path}:{row}")


@lru_cache(maxsize=4)
def _row_group(path: Path, group: int, column: str) -> Any:
    """One column of one row group; the few kept serve reads in order."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def text_of(value: Any, place: str) -> str:
    """`value` as a text that can be tokenised. Raises DataError: it is none."""
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


def names_in(names: Any) -> str:
    """Names in a row, for an error."""
    return ", ".join(map(str, names)) or "none"
