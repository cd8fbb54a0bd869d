"""Conversion without files: a dict of tensors into a model, a model into a dict of tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.convert.directory import HuggingFaceDirectory
from dsv3_jax.convert.exporting import exported_tensors
from dsv3_jax.convert.hf_config import model_config, quantization
from dsv3_jax.convert.inventory import check_values, take_inventory
from dsv3_jax.convert.outputs import DType, ScaleFormat
from dsv3_jax.convert.parameters import read_parameters
from dsv3_jax.convert.safetensors_header import TensorInfo
from dsv3_jax.convert.sources import TYPE_NAMES, ArrayTensors, DirectoryTensors
from dsv3_jax.convert.tensors import leaves_of
from dsv3_jax.model.functional import abstract_trees, put_together, skeleton_of, take_apart
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig

MEMORY = Path("memory")


def from_hugging_face(tensors: Mapping[str, Any], config: dict[str, Any]) -> tuple[Transformer, ModelConfig]:
    """A float32 model of the tensors of a Hugging Face checkpoint.

    Args:
        tensors: numpy or jax arrays by their names there, scales of FP8 included.
        config: its config.json.

    Raises:
        UserError: a model that this code is not; a tensor missing, left over, or of a wrong shape or type.
    """
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    infos = {
        name: TensorInfo(name, MEMORY, TYPE_NAMES.get(array.dtype, str(array.dtype)), array.shape, 0)
        for name, array in arrays.items()
    }
    model, quantized = model_config(config, MEMORY), quantization(config, MEMORY)
    directory = HuggingFaceDirectory(MEMORY, config, model, quantized, infos, {})
    inventory, reader = take_inventory(directory), _Arrays(arrays)
    inventory.refuse_problems(directory)
    check_values(inventory, reader)
    skeleton = skeleton_of(inventory.model)
    parameters, router_bias = abstract_trees(skeleton)
    read = read_parameters(DirectoryTensors(inventory, reader), {"parameters": parameters, "router_bias": router_bias})
    return put_together(skeleton, read["parameters"], read["router_bias"]), inventory.model


def to_hugging_face(
    model: Transformer, *, dtype: DType = "bf16", scale_format: ScaleFormat | None = None, mtp: bool = True
) -> dict[str, np.ndarray]:
    """The tensors that `export_checkpoint` would write of a model, by name; options as there."""
    parameters, router_bias = take_apart(model)
    found = jax.tree_util.tree_leaves_with_path({"parameters": parameters, "router_bias": router_bias})
    by_path = {tuple(key.key for key in path): np.asarray(leaf) for path, leaf in found}
    arrays = {leaf.name: by_path[leaf.path] for leaf in leaves_of(model.model)}
    source = ArrayTensors(model.model, arrays, {})
    return dict(exported_tensors(source, dtype=dtype, scale_format=scale_format, mtp=mtp))


class _Arrays:
    """Arrays read as a SafetensorsReader reads files."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays

    def read(self, info: TensorInfo, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        array = self._arrays[info.name].reshape(info.shape)
        return array[rows, columns] if array.ndim == 2 else array[rows]
