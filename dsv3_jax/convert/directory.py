"""A Hugging Face directory, opened: its configuration, what tensors its files hold, its texts. Reads no tensor."""

import fnmatch
import json
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.hf_config import Quantization, model_config, quantization, read_config
from dsv3_jax.convert.safetensors_header import TensorInfo, read_header
from dsv3_jax.model_config import ModelConfig

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# What comes along beside weights and configuration. No code: nothing of a checkpoint is ever executed.
TEXTS = ("*.json", "*.jinja", "*.txt", "*.md", "LICENSE*")
LARGEST_TEXT = 64 * 2**20


class HuggingFaceDirectory(NamedTuple):
    path: Path
    values: dict[str, Any]
    """config.json."""
    model: ModelConfig
    quantization: Quantization | None
    tensors: dict[str, TensorInfo]
    texts: dict[str, str]
    """Tokenizer, generation settings and licence, by file name."""

    @property
    def tokenizer(self) -> str | None:
        """Text of tokenizer.json."""
        return self.texts.get("tokenizer.json")


def is_hugging_face(path: Path) -> bool:
    """Whether a folder is of this kind, complete or not, and none of our own: those keep no weights at their top."""
    if any(path.glob("*.safetensors")) or (path / INDEX).exists():
        return True
    return (path / "config.json").is_file() and "architectures" in (path / "config.json").read_text(errors="replace")


def open_directory(path: Path) -> HuggingFaceDirectory:
    """Configuration and headers of every file.

    Raises:
        ConversionError: no such folder, no safetensors in it, a shard missing, a tensor in two shards.
        HuggingFaceConfigError: a model that this code is not, or an unknown quantisation.
        SafetensorsError: a file whose header is wrong or that ends before its last tensor.
    """
    if not path.is_dir():
        raise ConversionError(f"{path} is no folder: give one with config.json and *.safetensors")
    files = _files(path)
    values = read_config(path / "config.json")
    model, quantized = model_config(values, path / "config.json"), quantization(values, path / "config.json")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise ConversionError(f"tensor {name} is in both {tensors[name].file} and {file}: remove one")
            tensors[name] = info
    _compare_with_index(path, tensors)
    return HuggingFaceDirectory(path, values, model, quantized, tensors, _texts(path))


def _files(path: Path) -> list[Path]:
    """The files with weights: those that the index names, or all there are."""
    files = sorted(file for file in path.glob("*.safetensors"))
    if (path / INDEX).is_file():
        named = set(_weight_map(path).values())
        for name in sorted(named):
            if name.endswith(PICKLES):
                raise _pickle(path / name)
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ConversionError(f"{path / INDEX}: file {name!r} must be a *.safetensors in the same folder")
        missing = sorted(named - {file.name for file in files})
        if missing:
            what = "this one is" if len(missing) == 1 else f"{len(missing)} are"
            raise ConversionError(
                f"{path / missing[0]} is missing: {INDEX} names {len(named)} files, of which {what} not there"
            )
        return [file for file in files if file.name in named]
    if not files:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise _pickle(path / pickles[0])
        raise ConversionError(f"{path} has no *.safetensors file")
    return files


def _pickle(file: Path) -> ConversionError:
    return ConversionError(
        f"{file} is a pickle, which can run any code when it is read, so it is never opened here. Where you trust it: "
        "transformers.AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(OUT) writes safetensors"
    )


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConversionError(f"{path / INDEX} is not an index: {type(error).__name__}: {error}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{path / INDEX}: 'weight_map' must give a file name for every tensor")
    return weight_map


def _compare_with_index(path: Path, tensors: dict[str, TensorInfo]) -> None:
    if not (path / INDEX).is_file():
        return
    weight_map = _weight_map(path)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            there = f"it is in {tensors[name].file.name}" if name in tensors else "no file has it"
            raise ConversionError(f"{path / INDEX} says that {file} has tensor {name}, but {there}")
    for name, info in tensors.items():
        if name not in weight_map:
            raise ConversionError(f"{info.file} has tensor {name}, which {INDEX} does not name")


def is_text(name: str) -> bool:
    """Whether a file of this name comes along: a plain name, and none of a file that is written anew."""
    written = name == "config.json" or name.endswith(".index.json")
    plain = Path(name).name == name and not name.endswith(".py")
    return plain and not written and any(fnmatch.fnmatchcase(name, pattern) for pattern in TEXTS)


def _texts(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.iterdir() if is_text(file.name) and file.is_file())
    return {
        file.name: file.read_text(encoding="utf-8", errors="replace")
        for file in files
        if file.stat().st_size <= LARGEST_TEXT
    }
