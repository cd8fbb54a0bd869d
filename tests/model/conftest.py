import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest
from flax import nnx

from dsv3_jax.model.functional import put_together, skeleton_of
from dsv3_jax.model_config import ModelConfig
from tests.reference.weights import Tree


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """`run(model, (parameters, router_bias), function, *arrays)`: function(transformer, *arrays), compiled."""

    def compile_and_run(
        model: ModelConfig, weights: tuple[Tree, Tree], function: Callable[..., Any], *arrays: Any
    ) -> Any:
        return _compiled(model, function)(weights, *arrays)

    return compile_and_run


@pytest.fixture(scope="session")
def call() -> Callable[..., Any]:
    """`call(module, *arrays)`: module(*arrays), compiled."""
    return lambda module, *arrays: _call(*nnx.split(module), *arrays)


@functools.cache
def _compiled(model: ModelConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    skeleton = skeleton_of(model)
    return jax.jit(lambda weights, *arrays: function(put_together(skeleton, *weights), *arrays))


@functools.partial(jax.jit, static_argnums=0)
def _call(structure: nnx.GraphDef, state: nnx.State, *arrays: Any) -> Any:
    return nnx.merge(structure, state)(*arrays)
