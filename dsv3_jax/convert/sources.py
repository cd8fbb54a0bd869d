"""Where tensors are read from: a Hugging Face directory, one of our checkpoints, or arrays in memory.

All three give the same: any part of any tensor of the table, as it is stored. The parts are given, and come, in the
order of the tensor's bytes (`Leaf.matrix_dims`), whichever way our parameter turns them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import tensorstore

from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.fp8_blocks import decoded_scales, dequantized, requantized, scale_shape
from dsv3_jax.convert.inventory import FP8, Inventory, Reader, read_rows
from dsv3_jax.convert.safetensors_header import DTYPES
from dsv3_jax.convert.tensors import Leaf, Part, leaves_of
from dsv3_jax.model_config import ModelConfig

Index = tuple[int, ...]
# Chunks that were read in part and are read on with the next blocks: those of a trained checkpoint lie across tensors,
# and a chunk of an imported one's scales holds those of a layer.
CACHED_CHUNKS = 768 * 2**20
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredForm(NamedTuple):
    """How an imported checkpoint's tensors were kept where they came from, as far as its arrays do not say it."""

    scale_type: str = "F32"
    fused_experts: bool = False
    mtp_copies: bool = True
    types: Mapping[str, str] = {}
    """Types of tensors that were held in a wider one, because others of the same parameter were of another."""


class TensorSource(Protocol):
    """Any part of any tensor, in the type it is stored in."""

    model: ModelConfig
    leaves: list[Leaf]
    form: StoredForm

    def type_of(self, leaf: Leaf, index: Index) -> str:
        """Type of a tensor, as safetensors names it; those in FP8 have scales."""

    def read(self, leaf: Leaf, index: Index, part: Part) -> np.ndarray:
        """A part of a tensor in that type, of the shape of the part."""

    def scales(self, leaf: Leaf, index: Index) -> np.ndarray:
        """The scales of a tensor in FP8, one a block of 128 x 128, in `form.scale_type`."""


def values(source: TensorSource, leaf: Leaf, index: Index, part: Part) -> np.ndarray:
    """A part of a tensor as numbers: float32 where it is in FP8, otherwise as stored."""
    stored = source.read(leaf, index, part)
    if source.type_of(leaf, index) != FP8:
        return stored
    rows, columns = leaf.flat(part)
    matrix = stored.reshape(rows.stop - rows.start, columns.stop - columns.start)
    scales = decoded_scales(source.scales(leaf, index), source.form.scale_type)
    return dequantized(matrix, scales, rows.start, columns.start).reshape(stored.shape)


class DirectoryTensors:
    """Those of a Hugging Face directory, whose inventory has no problems."""

    def __init__(self, inventory: Inventory, reader: Reader):
        self.model, self.leaves = inventory.model, inventory.leaves
        self.form = StoredForm(inventory.scale_type, inventory.fused_experts, bool(inventory.copies))
        self._inventory, self._reader = inventory, reader

    def type_of(self, leaf: Leaf, index: Index) -> str:
        return "F32" if leaf.is_router_bias else self._inventory.type_of(leaf.tensor(index))

    def read(self, leaf: Leaf, index: Index, part: Part) -> np.ndarray:
        place = self._inventory.places[leaf.tensor(index)]
        rows, columns = leaf.flat(part)
        rows = slice(place.first_row + rows.start, place.first_row + rows.stop)
        array = self._reader.read(place.info, rows, columns if leaf.column_dims else slice(None))
        array = array.reshape([one.stop - one.start for one in part])
        return array.astype(np.float32) if leaf.is_router_bias else array

    def scales(self, leaf: Leaf, index: Index) -> np.ndarray:
        place = self._inventory.scales[leaf.tensor(index)]
        return read_rows(self._reader, place, scale_shape(*leaf.matrix_shape)[0])


class ArrayTensors:
    """Those of arrays, one a leaf: anything with `shape`, `dtype`, `transpose(dims)` and indexing."""

    def __init__(
        self, model: ModelConfig, arrays: Mapping[str, Any], scales: Mapping[str, Any], form: StoredForm | None = None
    ):
        """`arrays` by `Leaf.name`; `scales` by the same names, [*index_sizes, *grid], of leaves with any in FP8."""
        self.model, self.leaves = model, leaves_of(model)
        self.form = form or StoredForm()
        self._arrays, self._scales = arrays, scales

    def type_of(self, leaf: Leaf, index: Index) -> str:
        held = TYPE_NAMES[np.dtype(_dtype(self._arrays[leaf.name]))]
        return self.form.types.get(leaf.tensor(index), held) if self.form.types else held

    def read(self, leaf: Leaf, index: Index, part: Part) -> np.ndarray:
        array = _read(self._arrays[leaf.name].transpose(leaf.order)[index + part])
        kind = DTYPES[self.type_of(leaf, index)]
        if array.dtype == kind:
            return array
        if kind != DTYPES[FP8]:
            return array.astype(kind)
        rows, columns = leaf.flat(part)
        matrix = array.reshape(rows.stop - rows.start, columns.stop - columns.start)
        scales = decoded_scales(self.scales(leaf, index), self.form.scale_type)
        return requantized(matrix, scales, rows.start, columns.start).reshape(array.shape)

    def scales(self, leaf: Leaf, index: Index) -> np.ndarray:
        raw = _read(self._scales[leaf.name][index])
        return raw.view(ml_dtypes.float8_e8m0fnu) if raw.dtype == np.uint8 else raw


def saved_tensors(state: Path, model: ModelConfig, form: StoredForm | None) -> ArrayTensors:
    """Those of a checkpoint's `state` folder, read by TensorStore as they are asked for.

    Args:
        form: None for a checkpoint that was trained here.

    Raises:
        ConversionError: the folder does not hold this model's parameters.
    """
    metadata = json.loads((state / "_METADATA").read_text())
    names = {".".join(str(key["key"]) for key in one["key_metadata"]) for one in metadata["tree_metadata"].values()}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHED_CHUNKS}})

    def opened(name: str, cached: bool) -> Any:
        base = f"file://{state.resolve()}/"
        store: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {
            "driver": "zarr3" if metadata["use_zarr3"] else "zarr",
            "kvstore": store if metadata["use_ocdbt"] else f"{base}{name}/",
            "recheck_cached_data": "open",
            # An import writes every chunk: one that is not there is lost. Training leaves out those of zeros.
            "fill_missing_data_reads": metadata["use_ocdbt"],
        }
        return tensorstore.open(spec, open=True, read=True, context=context if cached else None).result()

    arrays, scales = {}, {}
    for leaf in leaves_of(model):
        if leaf.name not in names:
            raise ConversionError(f"{state} has no array {leaf.name}: it is of another model")
        # An imported tensor's chunks are the blocks it is read by: to keep them costs memory, and time to get it.
        arrays[leaf.name] = opened(leaf.name, cached=form is None)
        if tuple(arrays[leaf.name].shape) != leaf.shape:
            shape = list(arrays[leaf.name].shape)
            raise ConversionError(f"{state}: array {leaf.name} has shape {shape}, not {list(leaf.shape)}")
        if (scale := scales_name(leaf)) in names:
            scales[leaf.name] = opened(scale, cached=True)
    return ArrayTensors(model, arrays, scales, form)


def scales_name(leaf: Leaf) -> str:
    """Name of the array with a leaf's scales in an imported checkpoint's state."""
    return ".".join(map(str, ("scales", *leaf.path[1:])))


def scales_array_shape(leaf: Leaf) -> tuple[int, ...]:
    return (*leaf.index_sizes, *scale_shape(*leaf.matrix_shape))


def _dtype(array: Any) -> Any:
    return array.dtype.numpy_dtype if isinstance(array, tensorstore.TensorStore) else array.dtype


def _read(view: Any) -> np.ndarray:
    if not isinstance(view, tensorstore.TensorStore):
        return np.ascontiguousarray(view)
    try:
        return np.ascontiguousarray(view.read().result())
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore's, of files that are gone or not whole
        store = view.kvstore.url if view.kvstore else "an array"
        raise ConversionError(f"cannot read {store}: {str(error).strip().splitlines()[0]}") from error
