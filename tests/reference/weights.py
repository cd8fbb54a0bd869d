"""Random weights in which no part is idle: gains are not one, biases not zero, scores far from ties."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsv3_jax.model.functional import abstract_trees, skeleton_of
from dsv3_jax.model_config import ModelConfig

Tree = dict[str, Any]


def random_weights(model: ModelConfig, seed: int = 0, bias: tuple[float, float] = (0.0, 0.3)) -> tuple[Tree, Tree]:
    """`parameters` and `router_bias` of the model as float32 numpy arrays.

    `bias` is the mean and standard deviation of the selection biases.
    """
    parameters, router_bias = abstract_trees(skeleton_of(model))
    return _drawn(parameters, model, seed, bias), _drawn(router_bias, model, seed + 1, bias)


def random_module(
    make: Callable[[ModelConfig, nnx.Rngs], nnx.Module],
    model: ModelConfig,
    seed: int = 0,
    bias: tuple[float, float] = (0.0, 0.3),
) -> tuple[nnx.Module, Tree]:
    """One module of the model with such weights, and the same weights as a tree."""
    structure, abstract = nnx.split(nnx.eval_shape(lambda: make(model, nnx.Rngs(0))))
    weights = _drawn(nnx.to_pure_dict(abstract), model, seed, bias)
    return nnx.merge(structure, jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(weights))), weights


def layer(stacked: Tree, index: int) -> Tree:
    """The weights of one block of a stack."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _drawn(abstract: Tree, model: ModelConfig, seed: int, bias: tuple[float, float]) -> Tree:
    generator = np.random.default_rng(seed)

    def draw(path, leaf) -> np.ndarray:
        mean, std = {"gain": (1.0, 0.3), "bias": bias}.get(path[-1].key, (0.0, model.initializer_std))
        return (mean + std * generator.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)
