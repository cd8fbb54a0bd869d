"""The header of a safetensors file: which tensors, of which type and shape, at which bytes.

    8 bytes         length of the header, little-endian
    header          JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    rest            the tensors' bytes, row-major and little-endian; offsets count from here

A file comes from anywhere, so nothing in it is believed: no length it states is allocated, and what it says must add up
to the file's size exactly, each byte in one tensor.
"""

import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from dsv3_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""The format's types that are whole bytes, and what numpy calls them."""

LARGEST_HEADER = 100_000_000
"""Bytes; the library's limit too."""

_MOST_DIMS = 64  # numpy's
_LARGEST_NUMBER = 2**63 - 1
_FOREIGN = {
    b"PK\x03\x04": "it is a zip of pickles as torch.save writes, which can run code when read and is never opened here",
    b"version https://git-lfs": "it is a pointer that Git LFS puts in the file's place: run `git lfs pull`",
    **{
        bytes([0x80, protocol]): "it is a pickle, which can run code when read and is never opened here"
        for protocol in range(2, 6)
    },
}

_BRIEF = reprlib.Repr()  # a hostile file's values can be long, deep, or of several lines
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 160


class SafetensorsError(UserError):
    """A safetensors file that is damaged, hostile, cut short or missing. The message names file and tensor."""


class TensorInfo(NamedTuple):
    """Where a tensor lies."""

    name: str
    file: Path
    dtype: str
    """The format's name for the type, a key of DTYPES."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.begin + self.size

    def flattened(self) -> "TensorInfo":
        """The same bytes as a matrix, all dims but the last in one: [E, R, C] as [E * R, C]."""
        *leading, last = self.shape
        return self._replace(shape=(math.prod(leading), last))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name, in the order of their bytes. Reads the header alone.

    Raises:
        SafetensorsError: there is no such file, or it is no safetensors file that adds up to the last byte.
    """
    try:
        if not path.is_file():
            raise SafetensorsError(f"{path}: there is no such file")
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            start = file.read(32)
            length = _header_length(path, start, total)
            if not start[8 : 8 + length].startswith(b"{"):
                _refuse(path, start, f"its header begins with {start[8 : 8 + length][:1]!r}, need '{{'")
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise SafetensorsError(f"{path}: cannot be read: {error.strerror}") from error
    entries = _parsed(path, text)
    _check_metadata(path, entries.pop("__metadata__", {}))
    tensors = [_tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    _check_layout(path, tensors, 8 + length, total)
    return {info.name: info for info in tensors}


def laid_out(
    path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The bytes before the first tensor of a file to be, and where its tensors, (name, type, shape), will lie.

    Raises:
        ValueError: a name is there twice.
    """
    infos: dict[str, TensorInfo] = {}
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        if name in infos or name == "__metadata__":
            raise ValueError(f"{path} cannot have a tensor {name!r}: there is one")
        infos[name] = TensorInfo(name, path, dtype, tuple(shape), end)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, infos[name].end]}
        end = infos[name].end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    shifted = {name: info._replace(begin=begin + info.begin) for name, info in infos.items()}
    return len(text).to_bytes(8, "little") + text, shifted


def _header_length(path: Path, start: bytes, total: int) -> int:
    if len(start) < 8:
        _refuse(path, start, f"it has {total} bytes, too few for a safetensors file")
    length = int.from_bytes(start[:8], "little")
    if length > LARGEST_HEADER:
        _refuse(path, start, f"its header would be {length} bytes, need at most {LARGEST_HEADER}")
    if 8 + length > total:
        _refuse(path, start, f"its header would be {length} bytes, but {total - 8} follow: the file is cut short")
    return length


def _refuse(path: Path, start: bytes, reason: str) -> NoReturn:
    # Only once it is known to be no safetensors file: a header of 640 bytes starts as a pickle does.
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise SafetensorsError(f"{path}: this is no safetensors file: {what}")
    raise SafetensorsError(f"{path}: {reason}")


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise SafetensorsError(f"{path}: the header has {_BRIEF.repr(twice)} twice")
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise SafetensorsError(f"{path}: the header is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise SafetensorsError(f"{path}: the header is nested too deep") from error
    except ValueError as error:  # of JSON, or of an integer of thousands of digits
        raise SafetensorsError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise SafetensorsError(f"{path}: the header is a {type(entries).__name__}, need an object")
    return entries


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorsError(f"{path}: __metadata__ is {_BRIEF.repr(metadata)}, need an object of strings")


def _tensor_info(path: Path, name: str, entry: Any, data_begin: int) -> TensorInfo:
    tensor = f"{path}: tensor {_BRIEF.repr(name)}"
    if not name.isprintable():  # lone surrogates, line ends: no name in use has them, and it is printed and written
        raise SafetensorsError(f"{tensor}: need a name of printable characters")
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise SafetensorsError(f"{tensor} is {_BRIEF.repr(entry)}, need an object of {', '.join(sorted(keys))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SafetensorsError(f"{tensor} has dtype {_BRIEF.repr(dtype)}, need one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or not _is_numpys(shape, DTYPES[dtype]):
        raise SafetensorsError(f"{tensor} has shape {_BRIEF.repr(shape)}, need sizes of an array that there can be")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SafetensorsError(f"{tensor} has data_offsets {_BRIEF.repr(offsets)}, need [begin, end]")
    info = TensorInfo(name, path, dtype, tuple(shape), data_begin + offsets[0])
    if offsets[1] - offsets[0] != info.size:
        stated = f"{dtype} {_BRIEF.repr(shape)}"
        raise SafetensorsError(f"{tensor} has {offsets[1] - offsets[0]} bytes, need {info.size} for {stated}")
    return info


def _are_sizes(value: Any) -> bool:
    # bool is an int to isinstance
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= _LARGEST_NUMBER for number in value)


def _is_numpys(shape: list[int], dtype: np.dtype) -> bool:
    # numpy refuses the others also where a size of 0 leaves them without any bytes.
    return len(shape) <= _MOST_DIMS and math.prod(size for size in shape if size) * dtype.itemsize <= _LARGEST_NUMBER


def _check_layout(path: Path, tensors: list[TensorInfo], data_begin: int, total: int) -> None:
    """Every byte after the header in exactly one tensor."""
    end, before = data_begin, "the header"
    for info in tensors:
        tensor = f"tensor {_BRIEF.repr(info.name)}"
        if info.begin < end:
            raise SafetensorsError(f"{path}: {tensor} overlaps {before} by {end - info.begin} bytes")
        if info.begin > end:
            raise SafetensorsError(f"{path}: {info.begin - end} bytes between {before} and {tensor} are in no tensor")
        end, before = info.end, tensor
    if end > total:
        raise SafetensorsError(f"{path}: {end - total} of {end} bytes are missing: the file is cut short")
    if end < total:
        raise SafetensorsError(f"{path}: {total - end} bytes after {before} are in no tensor")
