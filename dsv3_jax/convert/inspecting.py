"""What is in a folder, held against the table: `python -m dsv3_jax.convert inspect DIR`. Reads headers alone."""

import math
import typing
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dsv3_jax.convert.directory import HuggingFaceDirectory, is_hugging_face, open_directory
from dsv3_jax.convert.importing import bytes_of
from dsv3_jax.convert.inventory import SCALE, Inventory, take_inventory
from dsv3_jax.convert.opening import open_model
from dsv3_jax.convert.outputs import DType, outputs_of, size_of
from dsv3_jax.convert.projection import in_words, memory
from dsv3_jax.convert.safetensors_header import DTYPES
from dsv3_jax.convert.sources import TensorSource
from dsv3_jax.convert.tensors import Leaf, leaves_of
from dsv3_jax.model_config import ModelConfig

SHOWN = 10
"""Names of missing or left-over tensors that are shown, of each kind."""


def inspect(path: Path, workers: int) -> tuple[str, bool]:
    """A report, and whether the folder holds one whole model.

    Raises:
        UserError: it holds nothing that can be held against the table.
    """
    if path.is_dir() and is_hugging_face(path):
        directory = open_directory(path)
        inventory = take_inventory(directory)
        whole = not (inventory.missing or inventory.left_over or inventory.wrong)
        return "\n".join(_directory_lines(directory, inventory, whole, workers)), whole
    opened = open_model(path)
    kind = "trained here" if opened.trained_here else "imported"
    lines = [f"{opened.path}: checkpoint, {kind}", *_model_lines(opened.config.model)]
    with opened.tensors() as tensors:
        lines += _table("arrays", Counter(_kinds(tensors)), _bytes_by_type(tensors))
        lines.append(_line("tokenizer", "yes" if opened.tokenizer else "none"))
        lines += _export_lines(tensors, workers)
    return "\n".join(lines), True


def _directory_lines(directory: HuggingFaceDirectory, inventory: Inventory, whole: bool, workers: int) -> Iterable[str]:
    architecture = ", ".join(directory.values.get("architectures") or [str(directory.values.get("model_type"))])
    yield f"{directory.path}: Hugging Face directory, {architecture}"
    yield from _model_lines(inventory.model)
    infos = directory.tensors.values()
    files = {info.file for info in infos}
    yield _line("files", f"{len(files)} with {len(infos):,} tensors, {in_words(sum(info.size for info in infos))}")
    sizes: Counter[str] = Counter()
    for info in infos:
        sizes[info.dtype] += info.size
    yield from _table("types", Counter(info.dtype for info in infos), sizes)
    yield _line("tokenizer", "yes" if directory.tokenizer else "none")
    for text in inventory.notes:
        yield _line("note", text)
    found, copies = len(inventory.places), len(inventory.copies)
    wanted = found + len([name for name in inventory.missing if not name.endswith(SCALE)])
    scales = f", {len(inventory.scales):,} scales" if inventory.scales else ""
    mtp = f", {copies} copies of embedding and head" if copies else ""
    yield _line("plan", f"{found:,} of {wanted:,} tensors{scales}{mtp}")
    for what, names in (("missing", inventory.missing), ("left over", inventory.left_over), ("wrong", inventory.wrong)):
        yield _line(what, f"{len(names):,}")
        yield from (_line("", name) for name in names[:SHOWN])
        if len(names) > SHOWN:
            yield _line("", f"... and {len(names) - SHOWN:,} more")
    if whole:
        yield _line("import", f"{in_words(bytes_of(inventory))} of disk, {in_words(memory(workers))} of memory")


def _model_lines(model: ModelConfig) -> list[str]:
    query = f"query latent {model.query_latent}" if model.query_latent else "no query latent"
    counts = {"model": 0, "MTP": 0}
    for leaf in leaves_of(model):
        counts["MTP" if leaf.path[1] == "mtp" else "model"] += math.prod(leaf.shape)
    mtp = f", {model.mtp_depth} MTP with {counts['MTP']:,} more" if model.mtp_depth else ", no MTP"
    return [
        _line(
            "model",
            f"{model.layers} layers ({model.dense_layers} dense) of width {model.width}, {model.heads} heads, {query}, "
            f"{model.experts} experts ({model.experts_per_token} a token, {model.shared_experts} shared), "
            f"{model.score_function} router",
        ),
        _line("parameters", f"{counts['model']:,}{mtp}"),
    ]


def _export_lines(tensors: TensorSource, workers: int) -> list[str]:
    lines = []
    for dtype in typing.get_args(DType):
        size = sum(map(size_of, outputs_of(tensors, dtype, None, mtp=True)))
        lines.append(_line(f"as {dtype}", f"{in_words(size)} of disk, {in_words(memory(workers))} of memory"))
    return lines


def _kinds(tensors: TensorSource) -> Iterable[str]:
    return (tensors.type_of(leaf, index) for leaf in tensors.leaves for index in leaf.indices())


def _bytes_by_type(tensors: TensorSource) -> Counter[str]:
    def size(leaf: Leaf, kind: str) -> int:
        return math.prod(leaf.matrix_shape) * DTYPES[kind].itemsize

    sizes: Counter[str] = Counter()
    for leaf in tensors.leaves:
        for index in leaf.indices():
            kind = tensors.type_of(leaf, index)
            sizes[kind] += size(leaf, kind)
    return sizes


def _table(title: str, numbers: Counter[str], sizes: Counter[str]) -> list[str]:
    kinds = sorted(sizes, key=lambda kind: -sizes[kind])
    lines = [f"{kind:<8} {numbers[kind]:>7,} tensors {in_words(sizes[kind]):>12}" for kind in kinds]
    return [_line(title if number == 0 else "", line) for number, line in enumerate(lines)]


def _line(title: str, text: str) -> str:
    return f"{title:<11} {text}"
