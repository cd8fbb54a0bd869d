"""All 163 files of DeepSeek-V3 as released, without the weights: real headers before holes of the real size."""

import json
import math
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest

from configs.v3_671b import config as v3
from dsv3_jax.command_line import run_main
from dsv3_jax.convert.__main__ import main
from dsv3_jax.convert.directory import INDEX, HuggingFaceDirectory, open_directory
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.importing import bytes_of
from dsv3_jax.convert.inventory import Inventory, take_inventory
from dsv3_jax.convert.safetensors_header import DTYPES, TensorInfo, laid_out
from dsv3_jax.convert.sources import DirectoryTensors
from dsv3_jax.convert.state import blocks_of
from dsv3_jax.model.functional import abstract_trees, skeleton_of
from tests.reference.released_configs import R1
from tests.reference.released_tensors import load

FILES, TENSORS, BYTES = 163, 91_991, 688_574_839_360
ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
Range = tuple[int, int]


class Laid(NamedTuple):
    """A tensor as the test laid it out."""

    file: str
    begin: int
    size: int
    shape: tuple[int, ...]


class Released(NamedTuple):
    path: Path
    laid: dict[str, Laid]
    headers: dict[str, int]
    """Bytes of each file before its first tensor."""


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Iterator[Released]:
    path = tmp_path_factory.mktemp("released")
    by_file: dict[str, list[tuple[str, str, tuple[int, ...]]]] = defaultdict(list)
    for name, dtype, shape, number in load():
        by_file[f"model-{number:05d}-of-{FILES:06d}.safetensors"].append((name, dtype, tuple(shape)))
    laid, headers = {}, {}
    for file, tensors in by_file.items():
        header, _ = laid_out(path / file, tensors, {"format": "pt"})
        (path / file).write_bytes(header)
        begin = headers[file] = len(header)
        for name, dtype, shape in tensors:
            laid[name] = Laid(file, begin, math.prod(shape) * ITEM_BYTES[dtype], shape)
            begin += laid[name].size
        os.truncate(path / file, begin)
    (path / "config.json").write_text(json.dumps(R1))
    index = {"metadata": {"total_size": BYTES}, "weight_map": {name: one.file for name, one in laid.items()}}
    (path / INDEX).write_text(json.dumps(index))
    yield Released(path, laid, headers)
    shutil.rmtree(path)  # 688 GB to whoever does not know that they are holes


@pytest.fixture(scope="module")
def directory(released) -> HuggingFaceDirectory:
    return open_directory(released.path)


@pytest.fixture(scope="module")
def inventory(directory) -> Inventory:
    return take_inventory(directory)


@pytest.fixture
def linked(released, tmp_path) -> Path:
    """The same files in a folder of their own, to change."""
    for file in (*released.headers, INDEX):
        (tmp_path / file).symlink_to(released.path / file)
    (tmp_path / "config.json").write_text(json.dumps(R1))
    return tmp_path


@pytest.fixture
def run_inspect(monkeypatch, capsys) -> Callable[[Path], tuple[int, str]]:
    """`inspect` of a folder: its exit code and what it prints."""

    def run(path: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert", "inspect", str(path)])
        with pytest.raises(SystemExit) as caught:
            run_main(main)
        out, errors = capsys.readouterr()
        assert errors == ""
        return caught.value.code, out

    return run


class Recorder:
    """In place of a SafetensorsReader: notes the bytes it is asked for, and gives zeros that take no memory."""

    def __init__(self):
        self.read_bytes: dict[str, list[Range]] = defaultdict(list)

    def read(self, info: TensorInfo, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        first, stop, _ = rows.indices(info.shape[0])
        assert columns.indices(math.prod(info.shape[1:]))[:2] == (0, math.prod(info.shape[1:]))
        row_bytes = info.size // info.shape[0]
        self.read_bytes[info.file.name].append((info.begin + first * row_bytes, info.begin + stop * row_bytes))
        return np.broadcast_to(np.zeros((), DTYPES[info.dtype]), (stop - first, *info.shape[1:]))


def test_every_header_is_read_as_it_was_laid(released, directory):
    assert len(directory.tensors) == len(released.laid) == TENSORS
    assert sum(info.size for info in directory.tensors.values()) == BYTES
    for name, info in directory.tensors.items():
        assert (info.file.name, info.begin, info.size, info.shape) == released.laid[name]


def test_every_byte_of_every_file_is_read_once(released, directory, inventory):
    assert (inventory.missing, inventory.left_over, inventory.wrong, inventory.notes) == ([], [], [], [])
    assert (len(inventory.places), len(inventory.scales), len(inventory.copies)) == (46_181, 45_808, 2)
    reader = Recorder()
    tensors = DirectoryTensors(inventory, reader)
    for leaf in inventory.leaves:
        blocks = blocks_of(leaf, DTYPES[inventory.leaf_type(leaf)].itemsize)
        for name, index in leaf.tensors():
            for block in blocks:
                part = tensors.read(leaf, index, block)
                assert part.shape == tuple(one.stop - one.start for one in block)
            if name in inventory.scales:
                rows, columns = leaf.matrix_shape
                assert tensors.scales(leaf, index).shape == (math.ceil(rows / 128), math.ceil(columns / 128))
    for copy in inventory.copies:
        reader.read(directory.tensors[copy])
    assert reader.read_bytes.keys() == released.headers.keys()
    for file, ranges in reader.read_bytes.items():
        end = released.headers[file]
        for begin, stop in sorted(ranges):
            assert begin == end, f"{file}: {begin} after {end}"
            end = stop
        assert end == (released.path / file).stat().st_size


def test_every_element_of_every_parameter_comes_from_one_place(released, inventory):
    parameters, router_bias = abstract_trees(skeleton_of(v3.model))
    trees = {"parameters": parameters, "router_bias": router_bias}
    wanted = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
    leaves = {leaf.path: leaf for leaf in inventory.leaves}
    assert {path: leaf.shape for path, leaf in leaves.items()} == wanted
    consumed: Counter[str] = Counter()
    for path, leaf in leaves.items():
        made = np.zeros([leaf.shape[dim] for dim in leaf.index_dims], int)
        for name, index in leaf.tensors():
            stack, place = _position(name)
            assert path[1 : 1 + len(stack)] == stack and index == place, name
            assert inventory.places[name].first_row == 0
            assert released.laid[name].shape == leaf.matrix_shape, name
            made[index] += 1
            consumed[name] += 1
        assert (made == 1).all()
        assert made.size * math.prod(leaf.matrix_shape) == math.prod(leaf.shape)
        _require_tiled(leaf.matrix_dims, blocks_of(leaf, 1))
    scales = {name for name in released.laid if name.endswith("_scale_inv")}
    assert {place.info.name for place in inventory.scales.values()} == scales
    assert consumed == dict.fromkeys(released.laid.keys() - scales - inventory.copies.keys(), 1)
    assert {place.first_row for place in inventory.scales.values()} == {0}
    assert all(place.info.name == f"{name}_scale_inv" for name, place in inventory.scales.items())


def test_nothing_grows(inventory):
    # Scales take their four bytes, and embedding and head of the MTP module are there once.
    assert bytes_of(inventory) == BYTES - 2 * 129_280 * 7168 * np.dtype(ml_dtypes.bfloat16).itemsize


def test_inspect_tells_it(released, run_inspect):
    code, told = run_inspect(released.path)
    assert code == 0
    for part in (
        "Hugging Face directory, DeepseekV3ForCausalLM",
        "61 layers (3 dense) of width 7168, 128 heads, query latent 1536, 256 experts (8 a token, 1 shared), sigmoid",
        "671,026,419,200",
        "1 MTP with 11,610,068,224 more",
        "163 with 91,991 tensors, 688.6 GB",
        "F8_E4M3   45,808 tensors     680.6 GB",
        "BF16         316 tensors       7.8 GB",
        "F32       45,867 tensors     166.2 MB",
        "46,181 of 46,181 tensors, 45,808 scales, 2 copies of embedding and head",
        "684.9 GB of disk",
        "of memory",
    ):
        assert part in told, part
    assert re.search(r"^missing +0\nleft over +0\nwrong +0$", told, re.MULTILINE)


def test_inspect_lists_what_a_shard_takes_with_it(released, linked, run_inspect):
    gone = linked / "model-00018-of-000163.safetensors"
    gone.unlink()
    with pytest.raises(ConversionError, match=f"{gone} is missing: .* names 163 files"):
        open_directory(linked)
    (linked / INDEX).unlink()
    held = {name for name, one in released.laid.items() if one.file == gone.name}
    weights = {name for name in held if not name.endswith("_scale_inv")}
    alone = {name for name in held - weights if name.removesuffix("_scale_inv") not in weights}
    left_over = {f"{name}_scale_inv" for name in weights} & (released.laid.keys() - held)
    # Files of the released checkpoint divide some weights from their scales.
    assert alone and left_over
    code, told = run_inspect(linked)
    assert code == 1
    assert re.search(rf"^missing +{len(weights) + len(alone):,}$", told, re.MULTILINE)
    assert re.search(rf"^left over +{len(left_over):,}$", told, re.MULTILINE)
    shown = [line.strip() for line in told.splitlines() if line.strip().startswith("model.layers.")]
    assert shown and set(shown) <= weights | alone | left_over
    assert f"{46_181 - len(weights):,} of 46,181 tensors" in told


@pytest.mark.parametrize(
    ("change", "missing", "left_over", "named"),
    [
        ({"num_hidden_layers": 62, "num_nextn_predict_layers": 0}, 0, 6, "model.layers.61.shared_head.head.weight"),
        ({"n_routed_experts": 264}, 8 * 3 * 59, 0, ".mlp.experts.256.down_proj.weight"),
    ],
)
def test_inspect_lists_where_config_and_files_differ(linked, run_inspect, change, missing, left_over, named):
    (linked / "config.json").write_text(json.dumps(R1 | change))
    code, told = run_inspect(linked)
    assert code == 1
    assert re.search(rf"^missing +{missing:,}$", told, re.MULTILINE)
    assert re.search(rf"^left over +{left_over:,}$", told, re.MULTILINE)
    assert named in told and "of disk" not in told


def _position(name: str) -> tuple[tuple[str | int, ...], tuple[int, ...]]:
    """In which stack of blocks a tensor belongs, and where in it: layer, expert, gate before up."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if not layer:
        return (), ()
    number = int(layer[1])
    stack = ("dense_blocks",) if number < 3 else ("moe_blocks",) if number < 61 else ("mtp", 0)
    index = [] if number == 61 else [number] if number < 3 else [number - 3]
    if expert := re.search(r"\.experts\.(\d+)\.", name):
        index.append(int(expert[1]))
    if which := re.search(r"\.(gate|up)_proj\.", name):
        index.append(("gate", "up").index(which[1]))
    return stack, tuple(index)


def _require_tiled(sizes: tuple[int, ...], blocks: list[tuple[slice, ...]]) -> None:
    end = 0
    for outer, *others in blocks:
        assert outer.start == end < outer.stop
        assert [(one.start, one.stop) for one in others] == [(0, size) for size in sizes[1:]]
        end = outer.stop
    assert end == sizes[0]
