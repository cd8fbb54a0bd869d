"""A Hugging Face directory held against the table: where every part of every parameter lies, and what does not fit."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dsv3_jax.convert.directory import HuggingFaceDirectory, open_directory
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.fp8_blocks import BLOCK, decoded_scales, scale_shape
from dsv3_jax.convert.safetensors_header import TensorInfo
from dsv3_jax.convert.tensors import Leaf, copies_of, leaves_of
from dsv3_jax.model_config import ModelConfig

FP8 = "F8_E4M3"
FLOATS = ("F32", "BF16", "F16")
SCALE_TYPES = ("F32", "F8_E8M0")
SCALE = "_scale_inv"
# Many times those of any model there is.
MOST_LAYERS, MOST_EXPERTS = 1000, 1_000_000
# Buffers that old checkpoints carry and every implementation computes.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
# transformers 5 keeps the experts of a layer in two tensors: gate_up_proj [E, 2F, D], gates first, and down_proj.
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<which>gate|up|down)_proj\.weight")


class Reader(Protocol):
    """SafetensorsReader, or what stands in for it."""

    def read(self, info: TensorInfo, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray: ...


class Place(NamedTuple):
    """Rows of a tensor in a file that are one tensor of the table."""

    info: TensorInfo
    first_row: int = 0


@dataclasses.dataclass
class Inventory:
    """What was found. `problems` tells whether it is a whole checkpoint of this model."""

    model: ModelConfig
    leaves: list[Leaf]
    places: dict[str, Place]
    """Of every tensor of the table that is there, where it lies."""
    scales: dict[str, Place]
    """Of every tensor in FP8, where its scales lie."""
    copies: dict[str, str]
    """MTP layers' copies of embedding and head that are there, and what they copy."""
    fused_experts: bool
    scale_type: str
    missing: list[str]
    left_over: list[str]
    wrong: list[str]
    """Sentences: a wrong shape or type, each naming file and tensor."""
    notes: list[str]
    _leaf_types: dict[str, str] = dataclasses.field(default_factory=dict)

    def type_of(self, name: str) -> str:
        return self.places[name].info.dtype

    def leaf_type(self, leaf: Leaf) -> str:
        """The type that holds all of a leaf's tensors exactly; with their scales, where FP8 is among others."""
        if leaf.name not in self._leaf_types:
            types = {self.type_of(name) for name, _ in leaf.tensors()}
            self._leaf_types[leaf.name] = types.pop() if len(types) == 1 and not leaf.is_router_bias else "F32"
        return self._leaf_types[leaf.name]

    def refuse_problems(self, directory: HuggingFaceDirectory) -> None:
        """Raise ConversionError naming the first problem of each kind and their numbers."""
        told = list(self.wrong[:1])
        if self.missing:
            told.append(f"{len(self.missing)} tensors are missing, the first {self.missing[0]}")
        if self.left_over:
            info = directory.tensors[self.left_over[0]]
            told.append(f"{len(self.left_over)} tensors are not of this model, the first {info.name} in {info.file}")
        if told:
            raise ConversionError(f"{directory.path} is not a whole checkpoint of its config.json: {'; '.join(told)}")


def opened_inventory(source: Path) -> tuple[HuggingFaceDirectory, Inventory]:
    """A Hugging Face directory and what is in it. Raises UserError where it is not whole."""
    directory = open_directory(source)
    inventory = take_inventory(directory)
    inventory.refuse_problems(directory)
    return directory, inventory


def take_inventory(directory: HuggingFaceDirectory) -> Inventory:
    """Every tensor's place in the model, and every one without. Reads nothing.

    Raises:
        ConversionError: config.json asks for more layers or experts than there are models of.
    """
    _refuse_absurd_sizes(directory)
    model, notes = _without_absent_mtp(directory)
    leaves, found = leaves_of(model), directory.tensors
    unnamed = set(directory.path.glob("*.safetensors")) - {info.file for info in found.values()}
    notes += [f"{file} is passed over: the index does not name it" for file in sorted(unnamed)]
    inventory = Inventory(model, leaves, {}, {}, {}, False, "F32", [], [], [], notes)
    used: set[str] = set()
    for leaf in leaves:
        for name, _ in leaf.tensors():
            place = _place(name, leaf.matrix_shape, model.experts, found, inventory)
            if place is None:
                inventory.missing.append(name)
                continue
            used.add(place.info.name)
            inventory.places[name] = place
            if place.info.dtype == FP8:
                _add_scales(name, leaf, found, inventory, used)
            elif place.info.dtype not in FLOATS:
                allowed = ", ".join((*FLOATS, FP8))
                inventory.wrong.append(
                    _wrong(place.info, f"has type {place.info.dtype}, which must be one of {allowed}")
                )
    for copy, original in copies_of(model).items():
        if copy in found and original in found:
            used.add(copy)
            inventory.copies[copy] = original
            if (found[copy].shape, found[copy].dtype) != (found[original].shape, found[original].dtype):
                inventory.wrong.append(_wrong(found[copy], f"must have shape and type of {original}, which it repeats"))
    # The experts of a fused tensor find the same fault each.
    inventory.missing = list(dict.fromkeys(inventory.missing))
    inventory.wrong = list(dict.fromkeys(inventory.wrong))
    inventory.left_over += [name for name in found if name not in used and not IGNORED.search(name)]
    return inventory


def _refuse_absurd_sizes(directory: HuggingFaceDirectory) -> None:
    """Before anything is made for every layer and expert that a damaged config.json names."""
    model = directory.model
    layers = model.layers + model.mtp_depth
    if layers > MOST_LAYERS or layers * model.experts > MOST_EXPERTS:
        raise ConversionError(
            f"{directory.path / 'config.json'} asks for {model.layers:,} layers, {model.mtp_depth:,} MTP layers and "
            f"{model.experts:,} experts in each: at most {MOST_LAYERS:,} layers and {MOST_EXPERTS:,} experts are read"
        )


def _without_absent_mtp(directory: HuggingFaceDirectory) -> tuple[ModelConfig, list[str]]:
    """The model with no MTP modules where config.json names some and the files have nothing of them."""
    model = directory.model
    first, last = model.layers, model.layers + model.mtp_depth
    prefixes = tuple(f"model.layers.{layer}." for layer in range(first, last))
    if not prefixes or any(name.startswith(prefixes) for name in directory.tensors):
        return model, []
    note = (
        f"config.json names {model.mtp_depth} MTP layers, but no tensor of layer {first} is there (transformers leaves "
        "them out when it saves): the model goes without"
    )
    return dataclasses.replace(model, mtp_depth=0), [note]


def _place(
    name: str, shape: tuple[int, ...], experts: int, found: dict[str, TensorInfo], inventory: Inventory
) -> Place | None:
    """Where a tensor of this name and shape lies: by itself, or among the experts of one fused tensor."""
    if name in found:
        if found[name].shape != shape:
            inventory.wrong.append(_wrong(found[name], f"has shape {list(found[name].shape)}, not {list(shape)}"))
        return Place(found[name])
    if not (match := EXPERT.fullmatch(name)):
        return None
    gate_up, number = match["which"] != "down", int(match["number"])
    info = found.get(f"{match['experts']}.{'gate_up' if gate_up else 'down'}_proj")
    return _fused(info, shape, experts, number, match["which"], inventory) if info else None


def _fused(
    info: TensorInfo, shape: tuple[int, ...], experts: int, number: int, which: str, inventory: Inventory
) -> Place:
    rows, columns = shape
    inventory.fused_experts = True
    rows_an_expert = rows if which == "down" else 2 * rows
    whole = (experts, rows_an_expert, columns)
    if info.shape != whole:
        inventory.wrong.append(_wrong(info, f"has shape {list(info.shape)}, not {list(whole)}"))
        return Place(info)
    return Place(info.flattened(), number * rows_an_expert + (rows if which == "up" else 0))


def _add_scales(name: str, leaf: Leaf, found: dict[str, TensorInfo], inventory: Inventory, used: set[str]) -> None:
    info, model = inventory.places[name].info, inventory.model
    if not leaf.quantized:
        inventory.wrong.append(_wrong(info, "is in FP8, which only matrices of attention and experts may be"))
        return
    rows, columns = leaf.matrix_shape
    if info.name != name and rows % BLOCK:
        inventory.wrong.append(_wrong(info, f"has FP8 blocks across experts: their width {rows} is no multiple of 128"))
        return
    scale = found.get(info.name + SCALE)
    if scale is None:
        inventory.missing.append(info.name + SCALE)
        return
    used.add(scale.name)
    grid = scale_shape(rows, columns)
    if info.name == name:
        if scale.shape != grid:
            inventory.wrong.append(_wrong(scale, f"has shape {list(scale.shape)}, not {list(grid)}: 128 x 128 blocks"))
        inventory.scales[name] = Place(scale)
    else:
        match = EXPERT.fullmatch(name)
        assert match is not None
        inventory.scales[name] = _fused(scale, grid, model.experts, int(match["number"]), match["which"], inventory)
    if scale.dtype not in SCALE_TYPES:
        inventory.wrong.append(_wrong(scale, f"has type {scale.dtype}, which must be one of {', '.join(SCALE_TYPES)}"))
    if len(inventory.scales) > 1 and scale.dtype != inventory.scale_type:
        inventory.wrong.append(_wrong(scale, f"has type {scale.dtype}, other scales have {inventory.scale_type}"))
    inventory.scale_type = scale.dtype


def _wrong(info: TensorInfo, what: str) -> str:
    return f"{info.file}: tensor {info.name} {what}"


def check_values(inventory: Inventory, reader: Reader) -> None:
    """Refuse scales and router biases that are no numbers, before anything is made of them; reads these alone.

    Raises:
        ConversionError: names file and tensor.
    """
    scales: Iterable[tuple[Leaf, str, Place]] = (
        (leaf, name, inventory.scales[name])
        for leaf in inventory.leaves
        for name, _ in leaf.tensors()
        if name in inventory.scales
    )
    for leaf, _, place in scales:
        values = decoded_scales(read_rows(reader, place, scale_shape(*leaf.matrix_shape)[0]), place.info.dtype)
        _refuse(place, values, ~np.isfinite(values) | (values < 0), "a scale must be finite and not negative")
    for leaf in inventory.leaves:
        if leaf.is_router_bias:
            for name, _ in leaf.tensors():
                place = inventory.places[name]
                values = reader.read(place.info).astype(np.float32)
                _refuse(place, values, ~np.isfinite(values), "a router bias must be finite")


def _refuse(place: Place, values: np.ndarray, bad: np.ndarray, right: str) -> None:
    if bad.any():
        first = tuple(np.argwhere(bad)[0])
        at = [int(first[0]) + place.first_row, *map(int, first[1:])]
        raise ConversionError(_wrong(place.info, f"has {values[first]} at {at}: {right}"))


def read_rows(reader: Reader, place: Place, rows: int) -> np.ndarray:
    """The rows of a place, in the type of the file."""
    return reader.read(place.info, slice(place.first_row, place.first_row + rows))
