"""The corpus: every document of `data.path`, split into training and validation by a hash of its name."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.documents import Document, DocumentFile, DocumentSource, JsonLinesFile, ParquetFile, TextFile
from dsv3_jax.data.errors import DataError

TEXT_EXTENSIONS = (".txt", ".py", ".md")
EXTENSIONS = (*TEXT_EXTENSIONS, ".jsonl", ".parquet")
# Not the library's own source: its tests, what was installed beside it, and the help texts generated from the manual
# (one file of 0.75 MB, which would outweigh all other held-out documents).
NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"})


class Documents:
    """Documents by number, in the order of their names: a random-access source for grain. Reads on access."""

    def __init__(self, files: Sequence[DocumentFile], places: np.ndarray):
        """`places`: int64 [documents, 2], the file and the row in it of every document."""
        self._files, self._places = files, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Document:
        file, row = self._places[index].tolist()
        return Document(self._files[file].name(row), self._files[file].text(row))

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Corpus:
    """The two halves of a corpus; no document is in both."""

    train: DocumentSource
    validation: DocumentSource


def open_corpus(data: DataConfig) -> Corpus:
    """Open `data.path` and split it.

    A document is held out if the SHA-256 of its name, as a fraction, is below `data.validation_share`: the same
    documents on every machine, and more of them, never others, at a larger share. Names are relative to the folder
    (of the file, or before the first wildcard). A corpus of one text file is cut instead: its last lines are held out.
    Text files are checked when opened; later lines of .jsonl and rows of .parquet when read. Empty text files and
    hidden files and folders are left out.

    Raises:
        DataError: nothing there, no known extension, undecodable, malformed, or an empty half.
    """
    root, paths = find_files(data.path, EXTENSIONS)
    files = _open_files(root, paths, data)
    places = _places(files)
    if not len(places):
        raise DataError(f"data.path={data.path!r} holds no text: {len(paths)} files, all empty")
    share = data.validation_share
    if len(places) == 1 and isinstance(files[0], TextFile) and share > 0:
        head, tail = files[0].split(share)
        return Corpus(Documents([head], places), Documents([tail], places))
    held_out = chosen_by_name([file.name(row) for file in files for row in range(len(file))], share)
    return Corpus(Documents(files, places[~held_out]), Documents(files, places[held_out]))


def chosen_by_name(names: Sequence[str], share: float) -> np.ndarray:
    """bool, one a name: whether the document of this name is held out.

    Raises:
        DataError: all are, or none.
    """
    fractions = np.fromiter(map(_fraction, names), np.float64, len(names))
    held_out = fractions < share
    if held_out.all():
        raise DataError(f"data.validation_share={share} leaves none of {len(names)} documents for training: lower it")
    if share > 0 and not held_out.any():
        raise DataError(
            f"data.validation_share={share} holds out none of {len(names)} documents: add documents, or raise it "
            f"above {fractions.min():.4f} to hold out one"
        )
    return held_out


def _places(files: Sequence[DocumentFile]) -> np.ndarray:
    rows = [np.arange(len(file), dtype=np.int64) for file in files]
    numbers = np.repeat(np.arange(len(files), dtype=np.int64), [len(file) for file in files])
    return np.stack([numbers, np.concatenate([np.zeros(0, np.int64), *rows])], axis=1)


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48


def _open_files(root: Path, paths: list[Path], data: DataConfig) -> list[DocumentFile]:
    files: list[DocumentFile] = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        if path.suffix.lower() == ".jsonl":
            files.append(JsonLinesFile(path, name, data.text_field))
        elif path.suffix.lower() == ".parquet":
            files.append(ParquetFile(path, name, data.text_field))
        else:
            file = TextFile(path, name)
            try:
                if file.text(0):
                    files.append(file)
            except DataError:
                # The standard library may carry sources in other encodings; a user's own files must be text.
                if data.path != "stdlib":
                    raise
    return files


def find_files(path: str, extensions: Sequence[str]) -> tuple[Path, list[Path]]:
    """The corpus's root and its files with these extensions, in the order of their names."""
    if path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [file for file in _walk(root, NOT_STDLIB) if file.suffix == ".py"]
        if not found:
            raise DataError(f"data.path='stdlib': no .py files in {root}; give a file, folder or glob instead")
    else:
        root, found = _find_user_files(Path(path).expanduser(), extensions)
    return root, sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _find_user_files(path: Path, extensions: Sequence[str]) -> tuple[Path, list[Path]]:
    if path.is_file():
        root, candidates = path.parent, [path]
    elif path.is_dir():
        root, candidates = path, list(_walk(path, frozenset()))
    elif glob.has_magic(str(path)):
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        candidates = [match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file()]
        if not candidates:
            raise DataError(f"data.path='{path}' matches no file")
    else:
        raise DataError(f"data.path='{path}' does not exist: give 'stdlib', or a file, folder or glob")
    known = [file for file in candidates if file.suffix.lower() in extensions]
    if not known:
        raise DataError(f"data.path='{path}' has no file ending in one of {' '.join(extensions)}")
    return root, known


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))
