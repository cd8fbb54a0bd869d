"""What a Hugging Face directory will hold: name, type and shape of every tensor, and what it is made of."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from dsv3_jax.convert.fp8_blocks import scale_shape
from dsv3_jax.convert.inventory import EXPERT, FP8, SCALE
from dsv3_jax.convert.safetensors_header import DTYPES
from dsv3_jax.convert.sources import Index, TensorSource
from dsv3_jax.convert.tensors import BLOCK, Leaf, copies_of

DType = Literal["fp8", "bf16", "f32"]
ScaleFormat = Literal["float32", "ue8m0"]
LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Piece(NamedTuple):
    """A tensor of the table, at some rows of an output."""

    leaf: Leaf
    at: Index
    first_row: int = 0


class Scale(NamedTuple):
    name: str
    type: str
    shape: tuple[int, ...]


class Output(NamedTuple):
    """One tensor of a file, and, in FP8, its scales; zeros, where it is made of nothing."""

    name: str
    type: str
    shape: tuple[int, ...]
    pieces: list[Piece]
    scale: Scale | None

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Names, types and shapes as a file lists them."""
        yield self.name, self.type, self.shape
        if self.scale:
            yield self.scale


def size_of(output: Output) -> int:
    """Bytes, scales included."""
    return sum(math.prod(shape) * DTYPES[kind].itemsize for _, kind, shape in output.tensors())


def outputs_of(source: TensorSource, dtype: DType | None, scale_format: ScaleFormat | None, mtp: bool) -> list[Output]:
    """Everything that is written, layer after layer; options as in `export_checkpoint`."""
    outputs, originals = [], {}
    for leaf in source.leaves:
        if leaf.path[1] == "mtp" and not mtp:
            continue
        fused = source.form.fused_experts and "experts" in leaf.path
        for pieces in _fused(leaf) if fused else _each(leaf):
            output = _output(source, pieces, fused, dtype, scale_format)
            outputs.append(output)
            originals[output.name] = output
    outputs += _zero_biases(source, mtp)
    if mtp and source.form.mtp_copies:
        outputs += [originals[original]._replace(name=copy) for copy, original in copies_of(source.model).items()]
    return sorted(outputs, key=lambda output: _place(output.name, source.model.layers))


def _zero_biases(source: TensorSource, mtp: bool) -> list[Output]:
    """Of a model with sigmoid scores and without biases: a DeepseekV3ForCausalLM has them."""
    model = source.model
    if model.selection_bias or model.score_function != "sigmoid":
        return []
    layers = range(model.dense_layers, model.layers + (model.mtp_depth if mtp else 0))
    names = (f"model.layers.{layer}.{BLOCK['feed_forward.router.bias'].name}" for layer in layers)
    return [Output(name, "F32", (model.experts,), [], None) for name in names]


def _each(leaf: Leaf) -> Iterator[list[Piece]]:
    for index in leaf.indices():
        yield [Piece(leaf, index)]


def _fused(leaf: Leaf) -> Iterator[list[Piece]]:
    """The experts of each layer as one, gates before ups."""
    stacked = leaf.path[1] != "mtp"
    layers: list[Index] = [(layer,) for layer in range(leaf.shape[0])] if stacked else [()]
    rows = leaf.matrix_shape[0]
    for layer in layers:
        inside = itertools.product(*map(range, leaf.index_sizes[len(layer) :]))
        yield [Piece(leaf, (*layer, *index), number * rows) for number, index in enumerate(inside)]


def _output(
    source: TensorSource, pieces: list[Piece], fused: bool, dtype: DType | None, scale_format: ScaleFormat | None
) -> Output:
    leaf, index, _ = pieces[0]
    stored, name = source.type_of(leaf, index), leaf.tensor(index)
    kind = _type(leaf, stored, dtype)
    shape: tuple[int, ...] = leaf.matrix_shape
    grid: tuple[int, ...] = scale_shape(*leaf.matrix_shape) if leaf.column_dims else ()
    if fused:
        match = EXPERT.fullmatch(name)
        assert match is not None
        name = f"{match['experts']}.{'down' if match['which'] == 'down' else 'gate_up'}_proj"
        experts = source.model.experts
        each = len(pieces) // experts
        shape, grid = ((experts, each * size[0], size[1]) for size in (shape, grid))
    if kind != FP8:
        return Output(name, kind, shape, pieces, None)
    scale_type = source.form.scale_type if stored == FP8 and scale_format is None else "F32"
    return Output(name, kind, shape, pieces, Scale(name + SCALE, scale_type, grid))


def _type(leaf: Leaf, stored: str, dtype: DType | None) -> str:
    if leaf.is_router_bias:
        return "F32"
    if dtype is None:
        return stored
    return {"fp8": FP8 if leaf.quantized else "BF16", "bf16": "BF16", "f32": "F32"}[dtype]


def _place(name: str, layers: int) -> tuple[float, list[str | int]]:
    """Sorts embedding, layers by number, final norm and head, then MTP layers; experts by number."""
    match = LAYER.match(name)
    if match:
        parts = re.split(r"(\d+)", name)
        return int(match[1]), [int(part) if part.isdecimal() else part for part in parts]
    return (-1 if name.startswith("model.embed") else layers - 0.5), [name]
