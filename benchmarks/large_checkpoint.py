"""A Hugging Face directory with the widths of DeepSeek-V3, fewer layers and experts, and random weights.

python -m benchmarks.large_checkpoint OUT [--layers=4] [--experts=16] [--vocabulary=129280] [--dtype=fp8]

Written as fast as the disk takes it: every block of rows is another stretch of the same noise.
"""

import dataclasses
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import tyro

from configs.v3_671b import config as v3
from dsv3_jax.command_line import run_main
from dsv3_jax.convert.directory import INDEX
from dsv3_jax.convert.hf_config_export import hugging_face_config
from dsv3_jax.convert.inventory import FP8
from dsv3_jax.convert.outputs import Output, outputs_of, size_of
from dsv3_jax.convert.safetensors_file import SafetensorsWriter
from dsv3_jax.convert.safetensors_header import DTYPES
from dsv3_jax.convert.sources import Index, StoredForm
from dsv3_jax.convert.tensors import Leaf, Part, leaves_of
from dsv3_jax.model_config import ModelConfig

BLOCK_BYTES = 16 * 2**20
SHARD_BYTES = 4 * 10**9  # the median of the released files


@dataclass(frozen=True)
class Size:
    """What there is less of than in V3; widths are V3's."""

    layers: int = 4
    """The first has a dense network, the others experts; the MTP layer comes on top."""
    experts: int = 16
    """In each layer, a multiple of 8; V3 has 256."""
    vocabulary: int = 129280
    """Embedding and head are each there twice, 1.9 GB every time with V3's."""
    dtype: Literal["fp8", "bf16"] = "fp8"
    """As released, or all in bf16."""


def model_of(size: Size) -> ModelConfig:
    return dataclasses.replace(
        v3.model,
        layers=size.layers,
        dense_layers=1,
        experts=size.experts,
        experts_per_token=4,
        expert_groups=2,
        groups_per_token=1,
        vocabulary=size.vocabulary,
    )


def fabricate(out: Path, size: Size) -> int:
    """Make the folder; returns the bytes of its tensors, every float of which is finite."""
    source, random = _Layout(size), np.random.default_rng(0)
    outputs = outputs_of(source, None, None, True)
    noise = {kind: _noise(kind, random) for kind in (FP8, "BF16", "F32")}
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    shards = _shards(outputs)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = [tensor for output in shard for tensor in output.tensors()]
        weight_map |= {name: file for name, _, _ in layout}
        with SafetensorsWriter(out / file, layout) as writer:
            for output in shard:
                # A MTP layer's copy is made of what it repeats, and so gets the same noise.
                leaf, index, _ = output.pieces[0]
                for name, kind, shape in output.tensors():
                    _write(writer, name, shape, noise[kind], zlib.crc32(leaf.tensor(index).encode()))
    total = sum(map(size_of, outputs))
    config = hugging_face_config(source.model, dtype="bfloat16", quantized=size.dtype == "fp8", mtp=True)
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(config))
    return total


class _Layout:
    """Types of the tensors, which is what names, shapes and order of a directory follow from; no values."""

    form = StoredForm()

    def __init__(self, size: Size):
        self.model = model_of(size)
        self.leaves = leaves_of(self.model)
        self._matrices = FP8 if size.dtype == "fp8" else "BF16"

    def type_of(self, leaf: Leaf, index: Index) -> str:
        return "F32" if leaf.is_router_bias else self._matrices if leaf.quantized else "BF16"

    def read(self, leaf: Leaf, index: Index, part: Part) -> np.ndarray:
        raise NotImplementedError

    def scales(self, leaf: Leaf, index: Index) -> np.ndarray:
        raise NotImplementedError


def _shards(outputs: list[Output]) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    for output in outputs:
        if shards[-1] and sum(map(size_of, (*shards[-1], output))) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(output)
    return shards


def _noise(kind: str, random: np.random.Generator) -> np.ndarray:
    """Two blocks of one type."""
    count = 2 * BLOCK_BYTES // DTYPES[kind].itemsize
    if kind == FP8:
        codes = random.integers(0, 256, count, np.uint8)
        codes[codes & 0x7F == 0x7F] = 0  # NaN
        return codes.view(ml_dtypes.float8_e4m3fn)
    if kind == "F32":
        return random.uniform(1e-5, 1e-3, count).astype(np.float32)
    return random.standard_normal(count, np.float32).astype(ml_dtypes.bfloat16)


def _write(writer: SafetensorsWriter, name: str, shape: tuple[int, ...], noise: np.ndarray, seed: int) -> None:
    width = shape[1] if len(shape) == 2 else 1
    rows = max(1, len(noise) // 2 // width)
    for number, first in enumerate(range(0, shape[0], rows)):
        count = min(rows, shape[0] - first)
        start = (seed + number * 999_983) % (len(noise) - count * width)
        writer.write(name, noise[start : start + count * width].reshape(count, *shape[1:]), first)


def main(out: tyro.conf.Positional[Path], size: tyro.conf.OmitArgPrefixes[Size] = Size()) -> None:
    print(f"{out}: {fabricate(out, size) / 1e9:.2f} GB")


if __name__ == "__main__":
    run_main(lambda: tyro.cli(main, use_underscores=True))
