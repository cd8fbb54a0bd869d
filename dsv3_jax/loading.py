"""A trained model from disk, ready to run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tokenizers import Tokenizer

from dsv3_jax.config import Config, ConfigError, Weights
from dsv3_jax.convert.opening import OpenedModel, open_model
from dsv3_jax.data.tokenizer import tokenizer_from
from dsv3_jax.inference.weights import with_inference_types
from dsv3_jax.model.functional import (
    Tree,
    abstract_trees,
    in_float8,
    logical_axes,
    parameter_specs,
    put_together,
    skeleton_of,
    to_run,
)
from dsv3_jax.model.transformer import Transformer
from sharding.mesh import one_device, shardings
from sharding.rules import check_layout

COMPUTE_TYPES = ("float32", "bfloat16")


def load(
    path: str | Path, *, mesh: Mesh | None = None, dtype: Any = None, weights: Weights = "compute"
) -> tuple[Transformer, Config, Tokenizer | None]:
    """The model on disk, its configuration and, where it has one, its tokenizer.

    `model(tokens)` gives float32 logits [B, S, W] of int32 tokens [B, S]. Nothing but the parameters is read, and they
    are held in the type they are used in.

    Args:
        path: a workdir of train.py (its newest checkpoint), a checkpoint, or a Hugging Face directory.
        mesh: devices to divide the parameters over, as in training, but that only fsdp stores what is not experts in
            pieces; each process reads what its devices hold. None: the first device.
        dtype: "float32" or "bfloat16", what the matmuls compute in; None: the saved `model.precision`, bfloat16 if
            that is fp8, which is for training.
        weights: "compute": held in that type. "float8": as the blocks of an FP8 checkpoint, in half of bfloat16's
            memory; each matrix becomes `dtype` where it is used, and the results are the same.

    Raises:
        UserError: none of these there, one that is not whole, or one not in FP8 that is to be held so.
        ConfigError: another dtype.
        LayoutError: a parameter does not divide over the mesh.
    """
    return load_opened(open_model(Path(path)), mesh=mesh, dtype=dtype, weights=weights)


def load_opened(
    opened: OpenedModel, *, mesh: Mesh | None = None, dtype: Any = None, weights: Weights = "compute"
) -> tuple[Transformer, Config, Tokenizer | None]:
    """`load` of a model that is open already."""
    config = _with_precision(opened.config, opened.config.model.dtype if dtype is None else dtype)
    skeleton, mesh = to_run(skeleton_of(config.model)), mesh or one_device()
    check_layout(abstract_trees(skeleton)[0], logical_axes(skeleton), mesh)
    if weights == "float8":
        skeleton = in_float8(skeleton, mesh)
    parameters, router_bias = abstract_trees(skeleton)
    parameters = with_inference_types(_abstract, parameters, config.model.precision)
    placed = shardings(mesh, parameter_specs(skeleton, mesh))
    read = opened.read({"parameters": _placed(parameters, placed[0]), "router_bias": _placed(router_bias, placed[1])})
    model = put_together(skeleton, read["parameters"], read["router_bias"])
    return model, config, tokenizer_of(opened)


def tokenizer_of(opened: OpenedModel) -> Tokenizer | None:
    """The tokenizer that lies with a model. Raises DataError and ConfigError as `load_tokenizer` does."""
    if opened.tokenizer is None:
        return None
    return tokenizer_from(opened.tokenizer, f"the tokenizer of {opened.path}", opened.config.model.vocabulary)


def _placed(abstract: Tree, places: Tree) -> Tree:
    def place(at: Any, leaves: Tree) -> Tree:  # a parameter in FP8 is two arrays in one place
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), leaves)

    return jax.tree.map(place, places, abstract)


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
