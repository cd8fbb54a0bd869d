"""Read parts of safetensors files, and write such files in parts, by any number of threads.

Our own, as the library cannot give float8 to numpy, reads whole files into mapped pages, which count as memory in use,
and writes only tensors that are all in memory. Checkpoints of 641 GiB go through these a few rows at a time.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dsv3_jax.convert.safetensors_header import DTYPES, SafetensorsError, TensorInfo, laid_out
from dsv3_jax.files import naming

PAGE = 4096
"""Bytes that the disk reads at least: narrower pieces of rows are cut from whole rows."""

_LARGEST_CALL = 1 << 30  # one call of Linux moves at most 2 GiB less a page, of macOS less than 2 GiB
_SCRATCH = 1 << 22  # bytes of whole rows at a time


class SafetensorsReader:
    """Reads parts of tensors, from as many files as there are, each opened when first needed. Thread-safe."""

    def __init__(self, most_open: int = 64):
        """At most `most_open` files stay open, besides those being read."""
        self._most_open = most_open
        self._files: dict[Path, _OpenFile] = {}  # the one used last is last
        self._lock = threading.Lock()
        self.bytes_read = 0
        """Bytes that all reads so far took from files."""

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. No read may be going on."""
        with self._lock:
            self._close_unused(0)

    def read(self, info: TensorInfo, rows: slice = slice(None), columns: slice = slice(None)) -> NDArray:
        """Part of a tensor, of any shape for the whole of it, of one dim for `rows`, of two for `rows` and `columns`.

        Takes no more from the file than that part, but whole rows where the columns are less than a page of each.

        Returns:
            A new contiguous array of the storage type.

        Raises:
            SafetensorsError: the file is gone, or ends before the tensor does.
            IndexError: a slice that is not within the tensor, or has a step.
        """
        dtype = DTYPES[info.dtype]
        whole = slice(None)
        if rows == whole and columns == whole:
            return self._contiguous(info, info.begin, info.size).view(dtype).reshape(info.shape)
        if len(info.shape) not in (1, 2) or (len(info.shape) == 1 and columns != whole):
            raise IndexError(
                f"{info.name} is {info.shape}: only a matrix has rows and columns, see TensorInfo.flattened"
            )
        first, last = _bounds(rows, info.shape[0])
        width = info.shape[1] if len(info.shape) == 2 else 1
        left, right = _bounds(columns, width)
        pitch = width * dtype.itemsize
        begin = info.begin + first * pitch
        if right - left == width:
            data = self._contiguous(info, begin, (last - first) * pitch)
        else:
            data = self._columns(info, begin, last - first, pitch, left * dtype.itemsize, right * dtype.itemsize)
        return data.view(dtype).reshape((last - first, *(right - left for _ in info.shape[1:])))

    def _contiguous(self, info: TensorInfo, begin: int, size: int) -> NDArray[np.uint8]:
        data = np.empty(size, np.uint8)
        with self._descriptor(info) as descriptor:
            self._fill(data, info, descriptor, begin)
        return data

    def _columns(self, info: TensorInfo, begin: int, rows: int, pitch: int, left: int, right: int) -> NDArray[np.uint8]:
        """Bytes left:right of each row of `pitch` bytes."""
        data = np.empty((rows, right - left), np.uint8)
        with self._descriptor(info) as descriptor:
            if right - left >= PAGE:
                for row, piece in enumerate(data):
                    self._fill(piece, info, descriptor, begin + row * pitch + left)
            elif data.size:
                scratch = np.empty((max(1, min(rows, _SCRATCH // pitch)), pitch), np.uint8)
                for row in range(0, rows, len(scratch)):
                    band = scratch[: rows - row]
                    self._fill(band.reshape(-1), info, descriptor, begin + row * pitch)
                    data[row : row + len(band)] = band[:, left:right]
        return data.reshape(-1)

    def _fill(self, data: NDArray[np.uint8], info: TensorInfo, descriptor: int, begin: int) -> None:
        view, done = data.data, 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done : done + _LARGEST_CALL]], begin + done)
            if not got:
                missing = len(view) - done
                raise SafetensorsError(f"{info.file}: tensor {info.name!r}: the file ends {missing} bytes too early")
            done += got
        with self._lock:
            self.bytes_read += done

    @contextmanager
    def _descriptor(self, info: TensorInfo) -> Iterator[int]:
        try:
            with self._lock:
                file = self._files.pop(info.file, None) or _OpenFile(info.file)
                self._files[info.file] = file
                file.readers += 1
                self._close_unused(self._most_open)
            try:
                yield file.descriptor
            finally:
                with self._lock:
                    file.readers -= 1
        except OSError as error:
            raise SafetensorsError(f"{info.file}: tensor {info.name!r} cannot be read: {error.strerror}") from error

    def _close_unused(self, most_open: int) -> None:
        # Never one that is being read: its number could be given to another file, whose bytes the reader would get.
        unused = [path for path, file in self._files.items() if not file.readers]
        for path in unused[: max(0, len(self._files) - most_open)]:
            os.close(self._files.pop(path).descriptor)


class _OpenFile:
    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.readers = 0


class SafetensorsWriter:
    """Writes a file whose tensors are known beforehand and come in any order, in blocks of rows. Thread-safe.

    The file has another name until `close`, so that under its own it is whole. As a context manager: closes, and after
    an exception leaves no file.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: dict[str, str] | None = None,
    ):
        """Begin the file.

        Args:
            path: in a folder that exists.
            tensors: name, type (a key of DTYPES) and shape of each, in the order of the file.
            metadata: {"format": "pt"} unless given, which transformers asks for.

        Raises:
            ValueError: a name is there twice.
            OSError: naming the file.
        """
        self.path = path
        header, self._tensors = laid_out(path, tensors, {"format": "pt"} if metadata is None else metadata)
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in self._tensors}
        self._lock = threading.Lock()
        self._temporary = path.with_name(path.name + ".tmp")
        with naming(self._temporary):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptor: int | None = os.open(self._temporary, flags, 0o666)
        try:
            self._put(np.frombuffer(header, np.uint8), 0)
            with naming(self._temporary):
                os.ftruncate(self._descriptor, max([len(header), *(info.end for info in self._tensors.values())]))
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self.close()
        finally:
            self.discard()

    def write(self, name: str, array: NDArray, first_row: int = 0) -> None:
        """Write rows of a tensor, each once: `array` is [rows, *the other dims], or has no dims as the tensor has none.

        A matrix may be rows of a tensor of more dims, all but its last counted as one.

        Raises:
            KeyError: a tensor that the file does not have.
            ValueError: another type, other dims, rows that the tensor does not have, or the file is closed.
            OSError: naming the file.
        """
        info = self._tensors[name]
        if array.ndim == 2 < len(info.shape):
            info = info.flattened()
        if array.dtype != DTYPES[info.dtype]:
            raise ValueError(f"{name} is {info.dtype} in {self.path}, got {array.dtype}")
        rows = array.shape[:1]
        stop = first_row + (rows[0] if rows else 1)
        fits = array.ndim == len(info.shape) and array.shape[1:] == info.shape[1:]
        if not fits or first_row < 0 or stop > (info.shape[0] if rows else 1):
            raise ValueError(f"{name} is {info.shape} in {self.path}, got {array.shape} at row {first_row}")
        if array.size:
            pitch = array.nbytes // (stop - first_row)
            self._put(np.ascontiguousarray(array).reshape(-1).view(np.uint8), info.begin + first_row * pitch)
            each = math.prod(info.shape[1:-1])
            with self._lock:
                self._written[name].append((first_row * each, stop * each))

    def close(self) -> None:
        """Give the file its name, once it is on the disk.

        Raises:
            ValueError: rows that were not written, or written twice.
            OSError: naming the file.
        """
        if self._descriptor is None:
            return
        for info in self._tensors.values():
            self._require_whole(info)
        with naming(self._temporary):
            os.fsync(self._descriptor)
        self._temporary.replace(self.path)
        os.close(self._descriptor)
        self._descriptor = None

    def discard(self) -> None:
        """Give the file up, unless it is closed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._temporary.unlink(missing_ok=True)

    def _put(self, data: NDArray[np.uint8], begin: int) -> None:
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        view, done = data.data, 0
        with naming(self._temporary):
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done : done + _LARGEST_CALL], begin + done)

    def _require_whole(self, info: TensorInfo) -> None:
        end = 0
        for first, stop in sorted(self._written[info.name]):
            if first != end:
                break
            end = stop
        rows = math.prod(info.shape[:1]) * math.prod(info.shape[1:-1])
        count = sum(stop - first for first, stop in self._written[info.name])
        if info.size and (end != rows or count != rows):
            raise ValueError(f"{info.name} of {self.path} is not whole: {count} of {rows} rows were written")


def _bounds(part: slice, size: int) -> tuple[int, int]:
    """First and stop of a slice, as written: what a list would silently cut is an error."""
    first, stop = part.start or 0, size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= first <= stop <= size:
        raise IndexError(f"{part} is no part of {size}")
    return first, stop
