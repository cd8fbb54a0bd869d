"""Conversion holds a bounded part of a checkpoint in memory, whatever its size: by measurement, on 12 GB.

python -m pytest tests/slow: takes minutes, and 30 GB of disk under --basetemp, which are free again at its end.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.large_checkpoint import Size, fabricate
from tests.slow.peak_memory import run_and_measure

pytestmark = pytest.mark.usefixtures("optimized")

SIZE = Size(layers=5, experts=16)
LARGEST_TENSOR = SIZE.vocabulary * 7168 * 2
MOST_MEMORY = 2 * 2**30 + LARGEST_TENSOR
DISK = 30 * 10**9
BLOCK = 16 * 2**20


@pytest.fixture
def folder(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert free >= DISK, f"{tmp_path} has {free / 1e9:.1f} GB free, the test needs {DISK / 1e9:.0f} GB: use --basetemp"
    try:
        yield tmp_path
    finally:
        shutil.rmtree(tmp_path)


def test_memory_stays_bounded_and_every_bit_comes_back(folder):
    original, saved, back, bf16 = (folder / name for name in ("original", "saved", "back", "bf16"))
    assert fabricate(original, SIZE) >= 3 * MOST_MEMORY
    peaks = {"import": convert("import", original, saved), "export": convert("export", saved, back)}
    assert_same_tensors(original, back)
    shutil.rmtree(original)
    shutil.rmtree(back)
    peaks["export to bf16"] = convert("export", saved, bf16, "--dtype=bf16")
    print({what: f"{peak / 1e6:,.0f} MB" for what, peak in peaks.items()})
    assert max(peaks.values()) <= MOST_MEMORY, peaks


def convert(*arguments: str | Path) -> int:
    """Run the command; the most memory it had, in bytes."""
    return run_and_measure([sys.executable, "-m", "dsv3_jax.convert", *map(str, arguments)])[1]


def assert_same_tensors(one: Path, other: Path) -> None:
    """Names, types, shapes and all bytes, a block at a time."""
    found = [tensors_of(folder) for folder in (one, other)]
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        (first, first_begin, *kind), (second, second_begin, *other_kind) = (tensors[name] for tensors in found)
        assert kind == other_kind, name
        size = kind[-1]
        with first.open("rb") as first_file, second.open("rb") as second_file:
            first_file.seek(first_begin)
            second_file.seek(second_begin)
            for begin in range(0, size, BLOCK):
                blocks = [file.read(min(BLOCK, size - begin)) for file in (first_file, second_file)]
                assert blocks[0] == blocks[1], f"{name}, from byte {begin}"


def tensors_of(folder: Path) -> dict[str, tuple[Path, int, str, list[int], int]]:
    """File, first byte, type, shape and bytes of every tensor, read as the format is specified."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            found[name] = (path, 8 + length + begin, tensor["dtype"], tensor["shape"], end - begin)
    return found
