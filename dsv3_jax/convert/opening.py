"""A model on disk, of any kind that this project reads, opened for its parameters."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dsv3_jax.config import Config, DataConfig, OptimizerConfig, TrainingConfig
from dsv3_jax.config_checks import check
from dsv3_jax.convert.directory import HuggingFaceDirectory, is_hugging_face
from dsv3_jax.convert.inventory import Inventory, check_values, opened_inventory
from dsv3_jax.convert.parameters import Tree, read_parameters
from dsv3_jax.convert.safetensors_file import SafetensorsReader
from dsv3_jax.convert.sources import DirectoryTensors, StoredForm, TensorSource, saved_tensors
from dsv3_jax.model.float8 import Float8Blocks
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.training.checkpoint import open_checkpoint, restore_part
from dsv3_jax.training.progress import note


class OpenedModel(NamedTuple):
    path: Path
    config: Config
    tokenizer: str | None
    """Text of tokenizer.json."""
    hugging_face: dict[str, Any] | None
    """"config" and other texts ("files") of the Hugging Face directory that the model came from, if it did."""
    tensors: Callable[[], AbstractContextManager[TensorSource]]
    """Its tensors, one by one."""
    trained_here: bool

    def read(self, abstract: Tree) -> Tree:
        """Arrays for {"parameters": ..., "router_bias": ...}, given as ShapeDtypeStructs or as arrays to replace."""
        if self.trained_here and not _float8_in(abstract):
            return restore_part(self.path, abstract)
        with self.tensors() as source:
            return read_parameters(source, abstract)

    def identity(self) -> Any:
        """What changes when the files do."""
        kinds = ("*.safetensors", "state/_METADATA", "*.json")
        files = sorted(file for kind in kinds for file in self.path.glob(kind))
        return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def open_model(path: Path) -> OpenedModel:
    """The model in a workdir of train.py (its newest checkpoint), a checkpoint, or a Hugging Face directory.

    Raises:
        UserError: none of these, or one that is not whole.
    """
    if path.is_dir() and is_hugging_face(path):
        directory, inventory = opened_inventory(path)
        for text in inventory.notes:
            note(text)
        files = {name: text for name, text in directory.texts.items() if name != "tokenizer.json"}
        return OpenedModel(
            path,
            fine_tuning_config(inventory.model),
            directory.tokenizer,
            {"config": directory.values, "files": files},
            partial(_in_files, directory, inventory),
            trained_here=False,
        )
    saved = open_checkpoint(path)
    form = (saved.hugging_face or {}).get("tensors")
    stored = StoredForm(**form) if form else None
    return OpenedModel(
        saved.directory,
        saved.config,
        saved.tokenizer,
        saved.hugging_face,
        lambda: nullcontext(saved_tensors(saved.directory / "state", saved.config.model, stored)),
        trained_here=form is None,
    )


def _float8_in(abstract: Tree) -> bool:
    leaves = jax.tree.leaves(abstract, is_leaf=lambda leaf: isinstance(leaf, Float8Blocks))
    return any(isinstance(leaf, Float8Blocks) for leaf in leaves)


@contextmanager
def _in_files(directory: HuggingFaceDirectory, inventory: Inventory) -> Iterator[TensorSource]:
    with SafetensorsReader() as reader:
        check_values(inventory, reader)
        before = reader.bytes_read
        yield DirectoryTensors(inventory, reader)
        whole = sum(info.size for info in directory.tensors.values())
        note(f"{directory.path}: read {(reader.bytes_read - before) / 1e6:,.1f} MB of {whole / 1e6:,.1f} MB")


def fine_tuning_config(model: ModelConfig) -> Config:
    """A whole configuration for a model that came without one: rates and batch of V3's fine-tuning (V3 section 5.1).

    Raises:
        ConfigError: the model cannot be trained at any length.
    """
    length = min(4096, model.maximum_positions)
    training = TrainingConfig(tokens=1000 * 64 * length, sequence_length=length, batch_size=64)
    config = Config(model, DataConfig(), training, OptimizerConfig(learning_rate=5e-6, warmup_steps=0))
    check(config)
    return config
