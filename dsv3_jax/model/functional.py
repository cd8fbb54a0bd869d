"""A model as plain trees: what jit, optimizers and checkpoints work on.

`parameters` and `router_bias` are nested dicts of arrays, keyed by attribute; the skeleton is everything static.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.model.float8 import Float8Blocks, blocks_of
from dsv3_jax.model.layers import RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig
from sharding.rules import RUNNING, partition_specs

Tree = dict[str, Any]


class Skeleton(NamedTuple):
    """A model without its values."""

    structure: nnx.GraphDef
    parameters: nnx.State
    """Shapes, types and logical axes of the parameters."""
    router_bias: nnx.State


def skeleton_of(model: ModelConfig) -> Skeleton:
    """The skeleton of a model of this shape; allocates nothing."""
    return Skeleton(*nnx.split(nnx.eval_shape(lambda: Transformer(model, nnx.Rngs(0))), nnx.Param, RouterBias))


def to_run(skeleton: Skeleton) -> Skeleton:
    """The skeleton of a model that only runs: on a mesh its parameters are stored as `sharding.rules.RUNNING` says."""

    def renamed(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("logical_axes")
        return variable.replace(logical_axes=tuple(RUNNING.get(axis, axis) for axis in axes))

    parameters = jax.tree.map(renamed, skeleton.parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return skeleton._replace(parameters=parameters)


def in_float8(skeleton: Skeleton, mesh: Mesh | None = None) -> Skeleton:
    """The skeleton with the matrices that an FP8 checkpoint has in FP8 so; only to run."""

    def changed(variable: nnx.Variable) -> nnx.Variable:
        shape = variable.get_value().shape
        blocks = blocks_of(variable.get_metadata("logical_axes"), shape, mesh)
        if blocks is None:
            return variable
        grid = tuple(-(-size // block) for size, block in zip(shape, blocks, strict=True))
        codes: Any = jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)
        scales: Any = jax.ShapeDtypeStruct(grid, jnp.float32)
        return variable.replace(Float8Blocks(codes, scales, blocks))

    parameters = jax.tree.map(changed, skeleton.parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return skeleton._replace(parameters=parameters)


def initialize(model: ModelConfig, seed: int, placed: Any = None) -> tuple[Tree, Tree]:
    """Fresh `parameters` and `router_bias`, compiled as one function; the same values wherever they are `placed`.

    `placed`: shardings of both trees; by default the first device.
    """
    # It runs once: compiling it takes XLA:CPU three times as long at the default level, for nothing gained.
    once = {"xla_backend_optimization_level": 1}
    make = jax.jit(
        lambda key: take_apart(Transformer(model, nnx.Rngs(key))), out_shardings=placed, compiler_options=once
    )
    return make(jax.random.key(seed))


def take_apart(model: Transformer) -> tuple[Tree, Tree]:
    """`parameters` and `router_bias` of a model."""
    parameters, router_bias = nnx.state(model, nnx.Param, RouterBias)
    return nnx.to_pure_dict(parameters), nnx.to_pure_dict(router_bias)


def put_together(skeleton: Skeleton, parameters: Tree, router_bias: Tree) -> Transformer:
    """The model with these values; inside jit, a model of tracers."""
    return nnx.merge(
        skeleton.structure, _filled(skeleton.parameters, parameters), _filled(skeleton.router_bias, router_bias)
    )


def abstract_trees(skeleton: Skeleton) -> tuple[Tree, Tree]:
    """`parameters` and `router_bias` as ShapeDtypeStructs."""
    return nnx.to_pure_dict(skeleton.parameters), nnx.to_pure_dict(skeleton.router_bias)


def logical_axes(skeleton: Skeleton) -> Tree:
    """The logical axes of every parameter, in a tree like `parameters`, each leaf a tuple of names."""
    return _axes(skeleton.parameters)


def parameter_specs(skeleton: Skeleton, mesh: Mesh) -> tuple[Tree, Tree]:
    """PartitionSpecs of `parameters` and `router_bias` on a mesh."""
    return partition_specs(_axes(skeleton.parameters), mesh), partition_specs(_axes(skeleton.router_bias), mesh)


def _axes(state: nnx.State) -> Tree:
    axes = jax.tree.map(
        lambda variable: variable.get_metadata("logical_axes"),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return nnx.to_pure_dict(axes)


def _filled(abstract: nnx.State, values: Tree) -> nnx.State:
    leaves, treedef = jax.tree.flatten(abstract)
    filled = jax.tree.leaves(values)
    if len(leaves) != len(filled):
        raise ValueError(f"the tree has {len(filled)} arrays, the model {len(leaves)}")
    return jax.tree.unflatten(treedef, filled)
