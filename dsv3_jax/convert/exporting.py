"""A model as a Hugging Face directory that transformers, vLLM and DeepSeek's own code load, streamed block by block.

From any source: a workdir or checkpoint of train.py, an imported checkpoint, or another Hugging Face directory, whose
type can be changed so (FP8 to BF16, say). Unless a type is asked for, every tensor is written as it is stored, bit for
bit.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dsv3_jax.convert.directory import INDEX, is_text
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.fp8_blocks import BLOCK, decoded_scales, encoded_scales, quantized
from dsv3_jax.convert.hf_config_export import DTypeName, hugging_face_config
from dsv3_jax.convert.inventory import FP8
from dsv3_jax.convert.observing import Observer, Silent
from dsv3_jax.convert.opening import OpenedModel, open_model
from dsv3_jax.convert.outputs import DType, Output, Piece, ScaleFormat, outputs_of, size_of
from dsv3_jax.convert.resumable import PartialFolder, require_space, run_units
from dsv3_jax.convert.safetensors_file import SafetensorsWriter
from dsv3_jax.convert.safetensors_header import DTYPES
from dsv3_jax.convert.sources import TensorSource, values
from dsv3_jax.convert.state import blocks_of
from dsv3_jax.convert.tensors import Part
from dsv3_jax.convert.texts import token_ids, tokenizer_texts
from dsv3_jax.files import write_atomically

SHARD_BYTES = 5 * 10**9
"""Tensors of one file at most, but for a tensor that is larger alone."""


class Writer(Protocol):
    """Where rows of tensors go."""

    def write(self, name: str, array: np.ndarray, first_row: int = 0) -> None: ...


class Shard(NamedTuple):
    file: str
    outputs: list[Output]


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    dtype: DType | None = None,
    scale_format: ScaleFormat | None = None,
    mtp: bool = True,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    observer: Observer | None = None,
) -> list[Output]:
    """Write the model in `source` to the new folder `out`; returns what was written.

    A process that is killed leaves `out`.partial, and the same call goes on from the last complete file.

    Args:
        dtype: "fp8" (matrices of attention and experts in blocks of 128 x 128, the rest bfloat16), "bf16" or "f32";
            router biases are float32 in all. None: every tensor as it is stored, a trained one in float32.
        scale_format: of FP8 blocks; "ue8m0" rounds scales up to powers of two (V3.1). None: as stored, or float32.
        mtp: whether MTP layers are written.
        workers: threads, each holding some 32 MiB several times over; by default one a processor.

    Raises:
        UserError: `source` is no model or not whole; `out` exists or its disk is too small; the config has what the
            format cannot say. All before anything is written.
    """
    observer = observer or Silent()
    opened = open_model(source)
    with opened.tensors() as tensors:
        outputs = outputs_of(tensors, dtype, scale_format, mtp)
        config = _config(opened, tensors, outputs, scale_format, mtp)
        texts = _texts(opened, config)
        shards = _shards(outputs, shard_bytes)
        identity = ["export", opened.identity(), dtype, scale_format, mtp, shard_bytes]
        total = sum(map(size_of, outputs))
        require_space(out, total)
        folder = PartialFolder(out, identity)
        workers = workers or os.cpu_count() or 1
        observer.plan(sum(map(size_of, outputs_of(tensors, None, None, mtp))), total, out, workers)
        observer.begin(total, sum(map(size_of, (o for s in shards if s.file in folder.finished for o in s.outputs))))
        with folder.writing():
            try:
                _write_shards(shards, tensors, scale_format, folder, observer, workers)
            finally:
                observer.end()
            index = {"metadata": {"total_size": total}, "weight_map": _weight_map(shards)}
            for name, text in {INDEX: _json(index), "config.json": _json(config), **texts}.items():
                write_atomically(folder.path / name, text)
            folder.complete()
    return outputs


def exported_tensors(
    tensors: TensorSource, *, dtype: DType | None = None, scale_format: ScaleFormat | None = None, mtp: bool = True
) -> Iterator[tuple[str, np.ndarray]]:
    """What `export_checkpoint` writes, one whole tensor after the other, in memory."""
    for output in outputs_of(tensors, dtype, scale_format, mtp):
        memory = _Memory(output)
        for task in _tasks(output, tensors, scale_format, memory, lambda _: None):
            task()
        yield from memory.arrays.items()


class _Memory:
    def __init__(self, output: Output):
        self.arrays = {name: np.empty(shape, DTYPES[kind]) for name, kind, shape in output.tensors()}

    def write(self, name: str, array: np.ndarray, first_row: int = 0) -> None:
        whole = self.arrays[name]
        rows = whole.reshape(-1, whole.shape[-1]) if whole.ndim > 1 else whole
        rows[first_row : first_row + len(array)] = array


def _write_shards(
    shards: list[Shard],
    tensors: TensorSource,
    scale_format: ScaleFormat | None,
    folder: PartialFolder,
    observer: Observer,
    workers: int,
) -> None:
    writers: dict[str, SafetensorsWriter] = {}

    def unit(shard: Shard) -> Iterator[Callable[[], None]]:
        layout = [tensor for output in shard.outputs for tensor in output.tensors()]
        writers[shard.file] = SafetensorsWriter(folder.path / shard.file, layout)
        for output in shard.outputs:
            yield from _tasks(output, tensors, scale_format, writers[shard.file], observer.advance)

    def finished(file: str) -> None:
        writers.pop(file).close()
        folder.finish(file)

    try:
        run_units(((s.file, unit(s)) for s in shards if s.file not in folder.finished), workers, finished)
    finally:
        for writer in writers.values():
            writer.discard()


def _tasks(
    output: Output,
    tensors: TensorSource,
    scale_format: ScaleFormat | None,
    writer: Writer,
    advance: Callable[[int], None],
) -> Iterator[Callable[[], None]]:
    """The blocks of an output, each a task that writes its rows and those of its scales."""
    if not output.pieces:
        yield functools.partial(writer.write, output.name, np.zeros(output.shape, DTYPES[output.type]))
    for piece in output.pieces:
        item_bytes = DTYPES[tensors.type_of(piece.leaf, piece.at)].itemsize
        for block in blocks_of(piece.leaf, item_bytes):
            yield functools.partial(_write_block, output, piece, block, tensors, scale_format, writer, advance)


def _write_block(
    output: Output,
    piece: Piece,
    block: Part,
    tensors: TensorSource,
    scale_format: ScaleFormat | None,
    writer: Writer,
    advance: Callable[[int], None],
) -> None:
    leaf, index = piece.leaf, piece.at
    rows, columns = leaf.flat(block)
    stored = tensors.type_of(leaf, index)
    shape = (rows.stop - rows.start, columns.stop - columns.start) if leaf.column_dims else (rows.stop - rows.start,)
    if output.scale is None:
        same = stored == output.type
        content = tensors.read(leaf, index, block) if same else values(tensors, leaf, index, block)
        content = content.reshape(shape).astype(DTYPES[output.type], copy=False)
    else:
        scales = _kept_scales(tensors, piece, scale_format) if stored == FP8 else None
        if scales is not None:
            content = tensors.read(leaf, index, block).reshape(shape)
            scales = scales[rows.start // BLOCK : -(-rows.stop // BLOCK)]
        else:
            numbers = values(tensors, leaf, index, block).reshape(shape).astype(np.float32, copy=False)
            content, new_scales = quantized(numbers, scale_format or "float32")
            scales = encoded_scales(new_scales, output.scale.type)
        writer.write(output.scale.name, np.ascontiguousarray(scales), (piece.first_row + rows.start) // BLOCK)
        advance(scales.nbytes)
    writer.write(output.name, np.ascontiguousarray(content), piece.first_row + rows.start)
    advance(content.nbytes)


def _kept_scales(tensors: TensorSource, piece: Piece, scale_format: ScaleFormat | None) -> np.ndarray | None:
    """The stored scales in the type that is written, where they are of the format asked for."""
    raw = tensors.scales(piece.leaf, piece.at)
    if scale_format is None:
        return raw
    numbers = decoded_scales(raw, tensors.form.scale_type)
    return numbers if scale_format == "float32" or (np.frexp(numbers)[0] == 0.5).all() else None


def _shards(outputs: list[Output], shard_bytes: int) -> list[Shard]:
    groups: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + size_of(output) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += size_of(output)
    names = (f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1))
    return [Shard(name, group) for name, group in zip(names, groups, strict=True)]


def _weight_map(shards: list[Shard]) -> dict[str, str]:
    return {name: shard.file for shard in shards for output in shard.outputs for name, _, _ in output.tensors()}


def _config(
    opened: OpenedModel, tensors: TensorSource, outputs: list[Output], scale_format: ScaleFormat | None, mtp: bool
) -> dict[str, Any]:
    kept: dict[str, Any] = (opened.hugging_face or {}).get("config") or token_ids(
        opened.tokenizer, tensors.model.vocabulary
    )
    in_fp8 = any(output.scale for output in outputs)
    before = (kept.get("quantization_config") or {}).get("scale_fmt")
    powers = scale_format == "ue8m0" or (scale_format is None and before == "ue8m0")
    types = {output.type for output in outputs} - {FP8}
    widest: DTypeName = "float32" if types == {"F32"} else "float16" if "F16" in types else "bfloat16"
    return hugging_face_config(
        tensors.model,
        dtype=widest,
        quantized=in_fp8,
        scale_format="ue8m0" if powers else "float32",
        mtp=mtp,
        kept=kept,
    )


def _texts(opened: OpenedModel, config: dict[str, Any]) -> dict[str, str]:
    """Tokenizer and generation settings: as they came, or made for a tokenizer that was trained here."""
    files = (opened.hugging_face or {}).get("files", {})
    # An imported checkpoint may be another's, and what it names is written.
    for name in files:
        if not is_text(name):
            raise ConversionError(f"{opened.path}: hugging_face.json has {name!r}, which is no text beside weights")
    if opened.tokenizer is None:
        return files
    if "tokenizer_config.json" in files:
        return {"tokenizer.json": opened.tokenizer, **files}
    return {**tokenizer_texts(opened.tokenizer, config), **files}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
