"""A trained model from disk, ready to run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.inference.weights import with_inference_types
from dsv3_jax.model.functional import abstract_trees, put_together, skeleton_of
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.checkpoint import open_checkpoint, restore_part

COMPUTE_TYPES = ("float32", "bfloat16")


def load(path: str | Path, *, dtype: Any = None) -> tuple[Transformer, Config, Tokenizer | None]:
    """The model in a workdir of train.py or in one of its checkpoints, its configuration and its tokenizer.

    `model(tokens)` gives float32 logits [B, S, W] of int32 tokens [B, S]. Nothing but the parameters is read, and they
    are held in the type they are used in.

    Args:
        path: a workdir or a `checkpoints` folder, for the newest checkpoint, or the folder of one step.
        dtype: "float32" or "bfloat16", what the matmuls compute in; None: the saved `model.precision`.

    Raises:
        CheckpointError: no checkpoint there, or an unreadable one.
        ConfigError: another dtype.
    """
    saved = open_checkpoint(Path(path))
    config = saved.config if dtype is None else _with_precision(saved.config, dtype)
    skeleton = skeleton_of(config.model)
    parameters, router_bias = abstract_trees(skeleton)
    parameters = with_inference_types(_abstract, parameters, config.model.precision)
    restored = restore_part(saved.directory, {"parameters": parameters, "router_bias": router_bias})
    tokenizer = load_tokenizer(saved.directory / "tokenizer" / "tokenizer.json", config.model.vocabulary)
    return put_together(skeleton, restored["parameters"], restored["router_bias"]), config, tokenizer


def _abstract(leaf: Any, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype)


def _with_precision(config: Config, dtype: Any) -> Config:
    try:
        precision = jnp.dtype(dtype).name
    except TypeError:
        precision = str(dtype)
    if precision not in COMPUTE_TYPES:
        raise ConfigError(f"dtype={precision} must be one of {', '.join(COMPUTE_TYPES)}")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
