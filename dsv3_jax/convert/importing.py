"""A Hugging Face directory into an Orbax checkpoint, streamed: no tensor is ever whole in memory.

Tensors keep their type and, chunk by chunk, their bytes: an array's chunks are rows of the tensors, and its codec says
in which order our dims lie in them. FP8 stays FP8, its scales in arrays of their own.

    OUT/state/                    parameters, router_bias, scales
       config/config.json         a run's configuration with this model
       tokenizer/tokenizer.json   as it came
       hugging_face/              the other texts, and how the tensors were kept
"""

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorstore

from dsv3_jax.config import to_json
from dsv3_jax.convert.directory import HuggingFaceDirectory
from dsv3_jax.convert.inventory import Inventory, Place, check_values, opened_inventory
from dsv3_jax.convert.observing import Observer, Silent
from dsv3_jax.convert.opening import fine_tuning_config
from dsv3_jax.convert.resumable import PartialFolder, require_space, run_units
from dsv3_jax.convert.safetensors_file import SafetensorsReader
from dsv3_jax.convert.safetensors_header import DTYPES
from dsv3_jax.convert.sources import DirectoryTensors, scales_array_shape, scales_name, values
from dsv3_jax.convert.state import blocks_of, create_state, flush, has_scales, open_array
from dsv3_jax.convert.tensors import Leaf, Part
from dsv3_jax.files import write_atomically

SMALL = "vectors and scales"


def import_checkpoint(
    source: Path, out: Path, *, workers: int | None = None, observer: Observer | None = None
) -> Inventory:
    """Convert the directory `source` into the checkpoint `out`, for train.py and infer.py; returns what was in it.

    A process that is killed leaves `out`.partial, and the same call goes on from the last complete file.

    Args:
        workers: threads, each holding some 32 MiB; by default one a processor.

    Raises:
        UserError: the directory is not whole, or not of this model family, or does not fit on the disk: before anything
            is written. A disk that fills up on the way: what was complete is kept.
    """
    observer = observer or Silent()
    directory, inventory = opened_inventory(source)
    for text in inventory.notes:
        observer.note(text)
    with SafetensorsReader() as reader:
        check_values(inventory, reader)
        identity = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _files(inventory)]
        require_space(out, bytes_of(inventory))
        folder = PartialFolder(out, ["import", identity, to_json(inventory.model)])
        workers = workers or os.cpu_count() or 1
        observer.plan(_bytes_to_read(inventory), bytes_of(inventory), out, workers)
        with folder.writing():
            _Import(directory, inventory, reader, folder, observer).run(workers)
            folder.complete()
    return inventory


def bytes_of(inventory: Inventory) -> int:
    """Bytes of the checkpoint that an inventory becomes."""
    total = 0
    for leaf in inventory.leaves:
        total += math.prod(leaf.shape) * DTYPES[inventory.leaf_type(leaf)].itemsize
        if has_scales(inventory, leaf):
            total += math.prod(scales_array_shape(leaf)) * DTYPES[inventory.scale_type].itemsize
    return total


def _bytes_to_read(inventory: Inventory) -> int:
    infos = [place.info for place in (*inventory.places.values(), *inventory.scales.values())]
    # Fused experts lie in one tensor.
    return sum({(info.file, info.begin): info.size for info in infos}.values())


class _Import:
    def __init__(
        self,
        directory: HuggingFaceDirectory,
        inventory: Inventory,
        reader: SafetensorsReader,
        folder: PartialFolder,
        observer: Observer,
    ):
        self.directory, self.inventory, self.reader = directory, inventory, reader
        self.folder, self.observer = folder, observer
        self.tensors = DirectoryTensors(inventory, reader)
        self.state = folder.path / "state"
        self.differing: set[str] = set()
        """Copies of embedding and head that are none."""

    def run(self, workers: int) -> None:
        if SMALL not in self.folder.finished:
            for begun in self.folder.path.glob("state*"):  # by another name until Orbax is done with it
                shutil.rmtree(begun)
            create_state(self.state, self.inventory)
            self._write_vectors_and_scales()
            self._finish(SMALL)
        by_file = {file.name: matrices for file, matrices in _matrices_by_file(self.inventory).items()}
        sizes = {file: sum(map(self._bytes, (leaf for leaf, _ in by_file[file]))) for file in by_file}
        done = self.folder.finished & by_file.keys()
        self.observer.begin(sum(sizes.values()), sum(sizes[file] for file in done))
        left = (file for file in by_file if file not in done)
        try:
            run_units(((file, self._tasks(by_file[file])) for file in left), workers, self._finish)
        finally:
            self.observer.end()
        for copy in sorted(self.differing):
            original = self.inventory.copies[copy]
            self.observer.note(
                f"tensor {copy} differs from {original}: the model has one for both, and keeps the latter"
            )
        self._write_texts()

    def _finish(self, unit: str) -> None:
        flush()
        self.folder.finish(unit)

    def _bytes(self, leaf: Leaf) -> int:
        """Of one of its tensors."""
        return math.prod(leaf.matrix_shape) * DTYPES[self.inventory.leaf_type(leaf)].itemsize

    def _tasks(self, matrices: list[tuple[Leaf, tuple[int, ...]]]) -> Iterator[Callable[[], None]]:
        """Every block of the matrices of one file."""
        for leaf, index in matrices:
            array = open_array(self.state, leaf.name)
            for block in self._blocks(leaf):
                yield functools.partial(self._convert, array, leaf, index, block)

    def _convert(self, array: tensorstore.TensorStore, leaf: Leaf, index: tuple[int, ...], block: Part) -> None:
        kind = DTYPES[self.inventory.leaf_type(leaf)]
        same = self.tensors.type_of(leaf, index) == self.inventory.leaf_type(leaf)
        read = self.tensors.read if same else functools.partial(values, self.tensors)
        content = read(leaf, index, block).astype(kind, copy=False)
        array.transpose(leaf.order)[index + block].write(content, can_reference_source_data_indefinitely=True).result()
        self._compare_copies(leaf, index, block, content)
        self.observer.advance(content.nbytes)

    def _compare_copies(self, leaf: Leaf, index: tuple[int, ...], block: Part, content: np.ndarray) -> None:
        """Say where a MTP layer's copy of embedding or head differs: the model has one for both."""
        name = leaf.tensor(index)
        for copy, original in self.inventory.copies.items():
            if original == name:
                rows, _ = leaf.flat(block)
                info = self.directory.tensors[copy]
                if self.reader.read(info, rows).tobytes() != content.tobytes():
                    self.differing.add(copy)

    def _write_vectors_and_scales(self) -> None:
        for leaf in self.inventory.leaves:
            if not leaf.column_dims:
                kind = DTYPES[self.inventory.leaf_type(leaf)]
                whole = tuple(slice(0, size) for size in leaf.matrix_dims)
                rows = [self.tensors.read(leaf, index, whole).astype(kind) for index in leaf.indices()]
                content = np.stack(rows).reshape(leaf.shape)
                open_array(self.state, leaf.name).write(content).result()
            if has_scales(self.inventory, leaf):
                self._write_scales(leaf)

    def _write_scales(self, leaf: Leaf) -> None:
        array, grid = open_array(self.state, scales_name(leaf)), scales_array_shape(leaf)
        first, *others = leaf.index_sizes or (1,)
        for layer in range(first):
            content = np.ones((*others, *grid[-2:]), DTYPES[self.inventory.scale_type])
            for index in np.ndindex(*others):
                place = (layer, *index)[: len(leaf.index_sizes)]
                if leaf.tensor(place) in self.inventory.scales:
                    content[index] = self.tensors.scales(leaf, place)
            content = content.view(np.uint8) if content.dtype.itemsize == 1 else content
            (array[layer] if leaf.index_sizes else array).write(content).result()

    def _write_texts(self) -> None:
        inventory, texts = self.inventory, dict(self.directory.texts)
        tokenizer = texts.pop("tokenizer.json", None)
        if tokenizer is not None:
            write_atomically(self.folder.path / "tokenizer" / "tokenizer.json", tokenizer)
        else:
            self.observer.note(f"{self.directory.path} has no tokenizer.json: the checkpoint goes without a tokenizer")
        form = {
            "scale_type": inventory.scale_type,
            "fused_experts": inventory.fused_experts,
            "mtp_copies": bool(inventory.copies),
            "types": exceptional_types(inventory),
        }
        record = {"config": self.directory.values, "files": texts, "tensors": form}
        write_atomically(self.folder.path / "hugging_face" / "hugging_face.json", json.dumps(record))
        config = fine_tuning_config(inventory.model)
        write_atomically(self.folder.path / "config" / "config.json", to_json(config))

    def _blocks(self, leaf: Leaf) -> list[Part]:
        return blocks_of(leaf, DTYPES[self.inventory.leaf_type(leaf)].itemsize)


def exceptional_types(inventory: Inventory) -> dict[str, str]:
    """Types of the tensors that were widened to that of their parameter."""
    exceptions: dict[str, str] = {}
    for leaf in inventory.leaves:
        held = inventory.leaf_type(leaf)
        if not leaf.is_router_bias:
            exceptions |= {name: kind for name, _ in leaf.tensors() if (kind := inventory.type_of(name)) != held}
    return exceptions


def _files(inventory: Inventory) -> list[Path]:
    """Every file with a tensor of the model, in the order of their names."""
    return sorted({place.info.file for place in (*inventory.places.values(), *inventory.scales.values())})


def _matrices_by_file(inventory: Inventory) -> dict[Path, list[tuple[Leaf, tuple[int, ...]]]]:
    """The matrices of every file, in the order they lie in it."""
    found: dict[Path, list[tuple[Place, Leaf, tuple[int, ...]]]] = {file: [] for file in _files(inventory)}
    for leaf in inventory.leaves:
        if leaf.column_dims:
            for name, index in leaf.tensors():
                place = inventory.places[name]
                found[place.info.file].append((place, leaf, index))
    for matrices in found.values():
        matrices.sort(key=lambda one: (one[0].info.begin, one[0].first_row))
    return {file: [(leaf, index) for _, leaf, index in matrices] for file, matrices in found.items()}
