"""Conversion holds a bounded part of a checkpoint in memory, whatever its size: by measurement, on 12 GB.

python -m pytest tests/slow: takes minutes, and 30 GB of disk under --basetemp, which are free again at its end.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.large_checkpoint import Size, fabricate

ROOT = Path(__file__).parents[2]
SIZE = Size(layers=5, experts=16)
LARGEST_TENSOR = SIZE.vocabulary * 7168 * 2
MOST_MEMORY = 2 * 2**30 + LARGEST_TENSOR
DISK = 30 * 10**9
ROWS = 1024
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


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
    command = [sys.executable, "-m", "dsv3_jax.convert", *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output
    return usage.ru_maxrss * RSS_UNIT


def assert_same_tensors(one: Path, other: Path) -> None:
    """Names, types, shapes and all bytes, read by the safetensors library a few rows at a time."""
    places = [places_of(folder) for folder in (one, other)]
    assert places[0].keys() == places[1].keys()
    opened = {file: safe_open(file, framework="pt") for place in places for file in set(place.values())}
    for name in places[0]:
        first, second = (opened[place[name]].get_slice(name) for place in places)
        assert (first.get_shape(), first.get_dtype()) == (second.get_shape(), second.get_dtype()), name
        for row in range(0, first.get_shape()[0], ROWS):
            rows = [tensor[row : row + ROWS].view(torch.uint8) for tensor in (first, second)]
            assert torch.equal(*rows), f"{name}, from row {row}"


def places_of(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found
