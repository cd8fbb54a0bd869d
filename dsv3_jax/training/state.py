"""The state of a run: everything a training step reads and writes, and where it lives on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, Tree, abstract_trees, initialize, parameter_specs
from dsv3_jax.training.optimizer import adamw
from sharding.mesh import shardings


class TrainState(NamedTuple):
    """Everything a step reads and writes."""

    step: Any
    """int32 array, optimizer steps done."""
    parameters: Tree
    router_bias: Tree
    optimizer: Any


def initial_state(config: Config, skeleton: Skeleton, mesh: Mesh) -> TrainState:
    """Parameters drawn from the config's seed, whatever the mesh; zero router biases; a fresh optimizer."""
    placed = shardings(mesh, state_specs(config, skeleton, mesh))
    parameters, router_bias = initialize(config.model, config.seed, (placed.parameters, placed.router_bias))
    begin = jax.jit(adamw(config, skeleton).init, out_shardings=placed.optimizer)
    step = jax.device_put(jnp.zeros((), jnp.int32), placed.step)
    return TrainState(step, parameters, router_bias, begin(parameters))


def abstract_state(config: Config, skeleton: Skeleton, mesh: Mesh) -> TrainState:
    """What `initial_state` returns, as ShapeDtypeStructs with their shardings; allocates nothing."""
    state, placed = _abstract_state(config, skeleton), shardings(mesh, state_specs(config, skeleton, mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, placed
    )


def state_specs(config: Config, skeleton: Skeleton, mesh: Mesh) -> TrainState:
    """A PartitionSpec for every array of the state; the optimizer's moments live where their parameters do."""
    parameters, router_bias = parameter_specs(skeleton, mesh)
    optimizer = optax.tree_utils.tree_map_params(
        adamw(config, skeleton),
        lambda _, spec: spec,
        _abstract_state(config, skeleton).optimizer,
        parameters,
        transform_non_params=lambda _: PartitionSpec(),
    )
    return TrainState(PartitionSpec(), parameters, router_bias, optimizer)


def _abstract_state(config: Config, skeleton: Skeleton) -> TrainState:
    parameters, router_bias = abstract_trees(skeleton)
    optimizer = jax.eval_shape(adamw(config, skeleton).init, parameters)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), parameters, router_bias, optimizer)
