"""What conversion is measured against: threads that read blocks, convert them and write them, and nothing else.

Every file that is read becomes one that is written, without a header, in whatever order the blocks come, and flushed to
disk at its end.
"""

import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from dsv3_jax.convert.fp8_blocks import BLOCK, dequantized, quantized
from dsv3_jax.convert.inventory import FP8, SCALE
from dsv3_jax.convert.safetensors_file import SafetensorsReader
from dsv3_jax.convert.safetensors_header import DTYPES, TensorInfo, read_header

BLOCK_BYTES = 16 * 2**20

Convert = Callable[[TensorInfo, np.ndarray, int], tuple[np.ndarray, ...]]
"""(tensor, some of its rows, the first row's number) to the arrays that are written. The rows are in a buffer that is
used again."""

_buffers = threading.local()


def bare_loop(source: Path, out: Path, workers: int, convert: Convert) -> None:
    """Read every tensor of a Hugging Face directory and write what `convert` makes of it to files in the new `out`."""
    out.mkdir()
    with ThreadPoolExecutor(workers) as pool:
        for file in sorted(source.glob("*.safetensors")):
            _convert_file(file, out / file.name, convert, pool)


def as_it_is(info: TensorInfo, rows: np.ndarray, first: int) -> tuple[np.ndarray, ...]:
    return (rows,)


def without(names: Collection[str]) -> Convert:
    """As it is, but these tensors are only read."""
    return lambda info, rows, first: () if info.name in names else (rows,)


def dequantizing(source: Path) -> Convert:
    """FP8 times its scales in bfloat16, the rest as it is."""
    infos = [info for file in source.glob("*.safetensors") for info in read_header(file).values()]
    with SafetensorsReader() as reader:
        scales = {info.name.removesuffix(SCALE): reader.read(info) for info in infos if info.name.endswith(SCALE)}

    def convert(info: TensorInfo, rows: np.ndarray, first: int) -> tuple[np.ndarray, ...]:
        if info.name.endswith(SCALE):
            return ()
        if info.dtype != FP8:
            return (rows,)
        return (dequantized(rows, scales[info.name], first).astype(ml_dtypes.bfloat16),)

    return convert


def quantizing(names: Collection[str]) -> Convert:
    """These tensors in FP8 with scales, the rest as it is."""

    def convert(info: TensorInfo, rows: np.ndarray, first: int) -> tuple[np.ndarray, ...]:
        return quantized(rows.astype(np.float32), "float32") if info.name in names else (rows,)

    return convert


def _convert_file(source: Path, out: Path, convert: Convert, pool: ThreadPoolExecutor) -> None:
    reading = os.open(source, os.O_RDONLY)
    writing = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    lock, end = threading.Lock(), 0

    def task(block: tuple[TensorInfo, int, int]) -> None:
        nonlocal end
        info, first, stop = block
        pitch = info.size // info.shape[0]
        data = _buffer((stop - first) * pitch)
        assert os.preadv(reading, [data.data], info.begin + first * pitch) == data.nbytes
        for array in convert(info, data.view(DTYPES[info.dtype]).reshape(stop - first, *info.shape[1:]), first):
            with lock:
                begin, end = end, end + array.nbytes
            assert os.pwrite(writing, array.reshape(-1).view(np.uint8).data, begin) == array.nbytes

    try:
        list(pool.map(task, (block for info in read_header(source).values() for block in _blocks(info))))
        os.fsync(writing)
    finally:
        os.close(writing)
        os.close(reading)


def _blocks(info: TensorInfo) -> Iterator[tuple[TensorInfo, int, int]]:
    """Rows of a tensor, whole FP8 blocks each."""
    pitch = info.size // info.shape[0]
    step = max(1, BLOCK_BYTES // (pitch * BLOCK)) * BLOCK
    for first in range(0, info.shape[0], step):
        yield info, first, min(first + step, info.shape[0])


def _buffer(size: int) -> np.ndarray:
    """Bytes of this thread's own."""
    if getattr(_buffers, "bytes", np.empty(0)).nbytes < size:
        _buffers.bytes = np.empty(max(size, BLOCK_BYTES), np.uint8)
    return _buffers.bytes[:size]
