"""Our reader and writer of safetensors against the library, byte for byte."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from dsv3_jax.convert import safetensors_file
from dsv3_jax.convert.safetensors_file import PAGE, SafetensorsReader, SafetensorsWriter
from dsv3_jax.convert.safetensors_header import DTYPES, SafetensorsError, read_header

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def some(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bytes as an array."""
    chosen, size = np.random.default_rng(seed), int(np.prod(shape)) * DTYPES[dtype].itemsize
    return chosen.integers(0, 2 if dtype == "BOOL" else 256, size, np.uint8).view(DTYPES[dtype]).reshape(shape)


def to_torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    if not array.size:
        return torch.empty(array.shape, dtype=TORCH[dtype])
    return torch.from_numpy(array.reshape(-1).view(np.uint8).copy()).view(TORCH[dtype]).reshape(array.shape)


def raw(array: np.ndarray) -> bytes:
    return array.tobytes()


def torch_raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def arrays() -> dict[str, tuple[str, np.ndarray]]:
    """Every type in every number of dims, the odd sizes first, so that the wide ones lie at odd offsets."""
    shapes = ((3,), (5, 7), (), (2, 3, 5), (0, 4))
    return {f"{dtype}.{len(shape)}": (dtype, some(dtype, shape)) for shape in shapes for dtype in reversed(DTYPES)}


def test_all_types_are_covered():
    assert TORCH.keys() == DTYPES.keys()


def test_what_the_library_writes_is_read(arrays, tmp_path):
    path = tmp_path / "library.safetensors"
    tensors = {name: to_torch(array, dtype) for name, (dtype, array) in arrays.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    header = read_header(path)
    assert header.keys() == arrays.keys()
    begins = [info.begin for info in header.values()]
    assert begins == sorted(begins)
    with SafetensorsReader() as reader:
        for name, (dtype, array) in arrays.items():
            info = header[name]
            assert (info.name, info.file, info.dtype, info.shape) == (name, path, dtype, array.shape)
            assert info.size == info.end - info.begin == array.nbytes
            read = reader.read(info)
            assert read.dtype == array.dtype and read.shape == array.shape and raw(read) == raw(array)
        assert reader.bytes_read == sum(array.nbytes for _, array in arrays.values())


def test_what_we_write_the_library_reads(arrays, tmp_path):
    path = tmp_path / "ours.safetensors"
    with SafetensorsWriter(path, [(name, dtype, array.shape) for name, (dtype, array) in arrays.items()]) as writer:
        for name, (_, array) in reversed(arrays.items()):
            writer.write(name, array)
        assert not path.exists()
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, (dtype, array) in arrays.items():
        tensor = loaded[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (TORCH[dtype], array.shape) and torch_raw(tensor) == raw(array)
    assert list(tmp_path.iterdir()) == [path] and list(read_header(path)) == list(arrays)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.fixture
def wide(tmp_path) -> tuple[Path, np.ndarray]:
    """A file of a matrix "m" whose rows are three pages, and a vector "v"; and the matrix."""
    path, matrix = tmp_path / "wide.safetensors", some("BF16", (24, 3 * PAGE // 2))
    tensors = {"v": to_torch(some("U8", (5,)), "U8"), "m": to_torch(matrix, "BF16")}
    safetensors.torch.save_file(tensors, path)
    return path, matrix


@pytest.mark.parametrize(
    ("rows", "columns", "taken"),
    [
        (slice(None), slice(None), 24 * 3 * PAGE),
        (slice(3, 10), slice(None), 7 * 3 * PAGE),
        (slice(3, 10), slice(0, 3 * PAGE // 2), 7 * 3 * PAGE),
        (slice(None), slice(PAGE // 2, PAGE), 24 * PAGE),
        (slice(5, 6), slice(7, 7 + PAGE // 2), PAGE),
        (slice(3, 10), slice(7, 7 + PAGE // 2 - 1), 7 * 3 * PAGE),
        (slice(0, 24), slice(3 * PAGE // 2 - 1, None), 24 * 3 * PAGE),
        (slice(4, 4), slice(None), 0),
        (slice(24, None), slice(2, 3), 0),
        (slice(2, 9), slice(6, 6), 0),
    ],
)
def test_a_part_takes_its_own_bytes_from_the_file(rows, columns, taken, wide, monkeypatch):
    path, matrix = wide
    monkeypatch.setattr(safetensors_file, "_SCRATCH", 5 * 3 * PAGE)
    with SafetensorsReader() as reader:
        part = reader.read(read_header(path)["m"], rows, columns)
        assert part.shape == matrix[rows, columns].shape and raw(part) == raw(matrix[rows, columns])
        assert part.flags.c_contiguous and part.flags.writeable and reader.bytes_read == taken


def test_rows_of_a_vector_and_of_flattened_tensors(tmp_path):
    path, array, vector = tmp_path / "f", some("F32", (3, 4, 5)), some("F8_E4M3", (9,))
    safetensors.torch.save_file({"a": to_torch(array, "F32"), "v": to_torch(vector, "F8_E4M3")}, path)
    header = read_header(path)
    with SafetensorsReader() as reader:
        assert raw(reader.read(header["v"], slice(2, 7))) == raw(vector[2:7]) and reader.bytes_read == 5
        flat = header["a"].flattened()
        assert flat.shape == (12, 5) and flat[:3] == header["a"][:3] and flat.begin == header["a"].begin
        part = reader.read(flat, slice(4, 8), slice(1, 3))
        assert part.shape == (4, 2) and raw(part) == raw(array[1, :, 1:3])
        assert header["v"].flattened().shape == (1, 9)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(0, 25), slice(None)),
        (slice(25, None), slice(None)),
        (slice(-1, None), slice(None)),
        (slice(5, 4), slice(None)),
        (slice(0, 24, 2), slice(None)),
        (slice(None), slice(0, 3 * PAGE // 2 + 1)),
    ],
)
def test_slices_that_a_list_would_cut_are_refused(rows, columns, wide):
    with SafetensorsReader() as reader, pytest.raises(IndexError, match="is no part of"):
        reader.read(read_header(wide[0])["m"], rows, columns)


def test_columns_of_a_vector_and_rows_of_three_dims_are_refused(wide):
    header = read_header(wide[0])
    with SafetensorsReader() as reader:
        with pytest.raises(IndexError, match="only a matrix has rows and columns"):
            reader.read(header["v"], slice(None), slice(0, 1))
        with pytest.raises(IndexError, match=r"m is \(2, 3, 4\): only a matrix"):
            reader.read(header["m"]._replace(shape=(2, 3, 4)), slice(0, 1))


def test_short_reads_and_writes_go_on(wide, monkeypatch, tmp_path):
    path, matrix = wide
    monkeypatch.setattr(safetensors_file, "_LARGEST_CALL", 1000)
    preadv, pwrite, sizes = safetensors_file.os.preadv, safetensors_file.os.pwrite, []

    def short_read(descriptor: int, views: list[memoryview], offset: int) -> int:
        sizes.append(len(views[0]))
        return preadv(descriptor, [views[0][:700]], offset)

    monkeypatch.setattr(safetensors_file.os, "preadv", short_read)
    monkeypatch.setattr(safetensors_file.os, "pwrite", lambda file, view, offset: pwrite(file, view[:700], offset))
    with SafetensorsReader() as reader:
        assert raw(reader.read(read_header(path)["m"])) == raw(matrix) and reader.bytes_read == matrix.nbytes
    assert max(sizes) == 1000
    copy = tmp_path / "copy"
    with SafetensorsWriter(copy, [("m", "BF16", matrix.shape)]) as writer:
        writer.write("m", matrix)
    assert torch_raw(safetensors.torch.load_file(copy)["m"]) == raw(matrix)


def test_a_file_that_shrank_or_went_is_an_error_naming_the_tensor(wide):
    path, _ = wide
    info = read_header(path)["m"]
    with path.open("r+b") as file:
        file.truncate(info.end - 10)
    with SafetensorsReader() as reader, pytest.raises(SafetensorsError, match=f"{path}: tensor 'm': .* 10 bytes too"):
        reader.read(info)
    path.unlink()
    with SafetensorsReader() as reader, pytest.raises(SafetensorsError, match=f"{path}: tensor 'm' cannot be read: No"):
        reader.read(info)


def test_threads_share_a_reader_of_more_files_than_may_be_open(tmp_path, monkeypatch):
    arrays = [some("BF16", (64, 100), seed) for seed in range(9)]
    infos = []
    for number, array in enumerate(arrays):
        safetensors.torch.save_file({"m": to_torch(array, "BF16")}, tmp_path / str(number))
        infos.append(read_header(tmp_path / str(number))["m"])
    opened: set[int] = set()
    lock, most = threading.Lock(), 0
    os_open, os_close = safetensors_file.os.open, safetensors_file.os.close

    def counted_open(*arguments: object) -> int:
        nonlocal most
        descriptor = os_open(*arguments)
        with lock:
            opened.add(descriptor)
            most = max(most, len(opened))
        return descriptor

    def counted_close(descriptor: int) -> None:
        with lock:
            opened.remove(descriptor)
        os_close(descriptor)

    monkeypatch.setattr(safetensors_file.os, "open", counted_open)
    monkeypatch.setattr(safetensors_file.os, "close", counted_close)
    with SafetensorsReader(most_open=2) as reader, ThreadPoolExecutor(4) as threads:

        def check(number: int) -> bool:
            rows = slice(number % 7, 50 + number % 11)
            return raw(reader.read(infos[number % 9], rows)) == raw(arrays[number % 9][rows])

        assert all(threads.map(check, range(2000)))
        assert reader.bytes_read == sum(200 * (50 + n % 11 - n % 7) for n in range(2000))
    assert not opened and most <= 6


def test_threads_write_blocks_of_one_file(tmp_path):
    path, matrix = tmp_path / "f", some("F8_E4M3", (1000, 33))
    tensors = [("first", "F32", (2,)), ("m", "F8_E4M3", matrix.shape), ("one", "BF16", ())]
    with SafetensorsWriter(path, tensors, metadata={}) as writer, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda row: writer.write("m", matrix[row : row + 7], row), range(0, 1000, 7)))
        writer.write("first", np.float32([1, 2]))
        writer.write("one", np.array(3, ml_dtypes.bfloat16))
    assert torch_raw(safetensors.torch.load_file(path)["m"]) == raw(matrix)


def test_a_block_that_is_not_contiguous_is_written_right(tmp_path):
    matrix = some("F32", (6, 4))
    with SafetensorsWriter(tmp_path / "f", [("m", "F32", (4, 6))]) as writer:
        writer.write("m", matrix.T)
    assert torch_raw(safetensors.torch.load_file(tmp_path / "f")["m"]) == raw(matrix.T.copy())


@pytest.mark.parametrize(
    ("array", "row"),
    [
        (np.zeros((2, 3), np.float64), 0),
        (np.zeros((2, 3), ">f4"), 0),
        (np.zeros((2, 4), np.float32), 0),
        (np.zeros(3, np.float32), 0),
        (np.zeros((2, 3), np.float32), 3),
        (np.zeros((2, 3), np.float32), -1),
    ],
)
def test_blocks_of_another_type_or_elsewhere_are_refused(array, row, tmp_path):
    writer = SafetensorsWriter(tmp_path / "f", [("m", "F32", (4, 3))])
    with pytest.raises(ValueError, match=r"m is (F32|\(4, 3\)) in .*, got"):
        writer.write("m", array, row)
    writer.discard()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is closed"):
        writer.write("m", np.zeros((4, 3), np.float32))


def test_tensors_of_one_name_are_refused(tmp_path):
    for names in (("a", "a"), ("__metadata__",)):
        with pytest.raises(ValueError, match="there is one"):
            SafetensorsWriter(tmp_path / "f", [(name, "F32", ()) for name in names])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [[], [0, 1, 2], [0, 1, 3], [0, 1, 2, 2], [0, 1, 2, 3, 3], [1, 2, 3]])
def test_a_file_that_is_not_whole_never_gets_its_name(rows, tmp_path):
    with (
        pytest.raises(ValueError, match=f"m of .*f is not whole: {len(rows)} of 4 rows"),
        SafetensorsWriter(tmp_path / "f", [("m", "F32", (4, 3))]) as writer,
    ):
        for row in rows:
            writer.write("m", np.zeros((1, 3), np.float32), row)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_alone(error, tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(error), SafetensorsWriter(path, [("m", "F32", ())]) as writer:
        writer.write("m", np.array(1, np.float32))
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stage", ["pwrite", "fsync", "ftruncate"])
def test_a_full_disk_names_the_file_and_leaves_none(stage, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file.os, stage, fail)
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'f.tmp'}'"),
        SafetensorsWriter(tmp_path / "f", [("m", "F32", ())]) as writer,
    ):
        writer.write("m", np.array(1, np.float32))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none")):
        SafetensorsWriter(tmp_path / "none" / "f", [])
