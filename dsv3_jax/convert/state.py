"""The state folder of an imported checkpoint: Orbax's, with arrays whose chunks are the tensors' own bytes."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from dsv3_jax.convert.fp8_blocks import BLOCK
from dsv3_jax.convert.inventory import Inventory
from dsv3_jax.convert.safetensors_header import DTYPES
from dsv3_jax.convert.sources import scales_array_shape
from dsv3_jax.convert.tensors import Leaf, Part
from dsv3_jax.training.checkpoint import quiet_orbax

BLOCK_BYTES = 32 * 2**20
"""What a thread holds at a time, and what a chunk of an array is at most, about."""


def has_scales(inventory: Inventory, leaf: Leaf) -> bool:
    return leaf.quantized and any(name in inventory.scales for name, _ in leaf.tensors())


def blocks_of(leaf: Leaf, item_bytes: int) -> list[Part]:
    """What a tensor is read and written by; whole FP8 blocks each."""
    return leaf.blocks(BLOCK, BLOCK_BYTES // item_bytes)


def create_state(state: Path, inventory: Inventory) -> None:
    """An Orbax checkpoint with an empty array for every parameter, router bias and scale array.

    Orbax writes what makes the folder its own; of each array, saved as a single number, only the name is kept.
    """
    arrays: dict[str, tensorstore.Spec] = {}
    tree: dict[str | int, Any] = {}

    def add(path: tuple[str | int, ...], spec: tensorstore.Spec) -> None:
        arrays[".".join(map(str, path))] = spec
        below: dict[str | int, Any] = tree
        for key in path[:-1]:
            below = below.setdefault(key, {})
        below[path[-1]] = np.zeros((), np.uint8)

    for leaf in inventory.leaves:
        kind = inventory.leaf_type(leaf)
        chunk = list(leaf.shape)
        if leaf.column_dims:
            first = blocks_of(leaf, DTYPES[kind].itemsize)[0]
            for dim in leaf.index_dims:
                chunk[dim] = 1
            chunk[leaf.row_dims[0]] = first[0].stop - first[0].start
        add(leaf.path, _spec(leaf.shape, chunk, DTYPES[kind], leaf.order))
        if has_scales(inventory, leaf):
            shape = scales_array_shape(leaf)
            chunk = [1, *shape[1:]] if leaf.index_sizes else list(shape)
            kind_of_scale = np.dtype(np.uint8 if DTYPES[inventory.scale_type].itemsize == 1 else np.float32)
            add(("scales", *leaf.path[1:]), _spec(shape, chunk, kind_of_scale, tuple(range(len(shape)))))
    quiet_orbax()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as writer:
        writer.save(state.resolve(), args=ocp.args.PyTreeSave(tree))
    for name, spec in arrays.items():
        shutil.rmtree(state / name)
        tensorstore.open(spec, kvstore=tensorstore.KvStore.Spec(_store(state, name)), create=True).result()


def open_array(state: Path, name: str) -> tensorstore.TensorStore:
    """One array of a state that `create_state` made, to write. What is written is on the disk after `flush`."""
    spec = {
        "driver": "zarr3",
        "kvstore": _store(state, name),
        # A block of zeros is stored as any other: -0.0 would otherwise come back as 0.0.
        "store_data_equal_to_fill_value": True,
        # A thread would wait for the disk after each chunk.
        "context": {"file_io_sync": False},
    }
    return tensorstore.open(spec, open=True).result()


def flush() -> None:
    """Return when all that was written is on the disk."""
    os.sync()


def _store(state: Path, name: str) -> str:
    return f"file://{state.resolve()}/{name}/"


def _spec(shape: tuple[int, ...], chunk: list[int], dtype: np.dtype, order: tuple[int, ...]) -> tensorstore.Spec:
    codecs: list[dict[str, Any]] = [{"name": "transpose", "configuration": {"order": list(order)}}]
    codecs.append({"name": "bytes", "configuration": {"endian": "little"}} if dtype.itemsize > 1 else {"name": "bytes"})
    metadata = {
        "data_type": dtype.name,
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": codecs if shape else codecs[1:],
    }
    return tensorstore.Spec({"driver": "zarr3", "metadata": metadata})
