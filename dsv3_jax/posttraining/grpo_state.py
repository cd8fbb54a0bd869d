"""The state of a GRPO run: that of any training run, and the reference where the loss or the reward has one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, Tree
from dsv3_jax.training.state import TrainState, abstract_state, state_specs


class GRPOState(NamedTuple):
    """Named as in TrainState, so that a checkpoint of it opens as any other."""

    step: Any
    """int32 array, updates done."""
    parameters: Tree
    router_bias: Tree
    """Never changed: the routing that is replayed was chosen with it."""
    optimizer: Any
    reference: Tree
    """Parameters of the reference; empty without KL."""


def grpo_state(state: TrainState, config: Config) -> GRPOState:
    """The policy itself is the first reference. Also of specs and of abstract arrays in a TrainState."""
    return GRPOState(*state, state.parameters if config.grpo.kl_weight else {})


def first_grpo_state(state: TrainState, config: Config) -> GRPOState:
    """Of a run that begins."""
    return with_fresh_reference(grpo_state(state, config))


def abstract_grpo_state(config: Config, skeleton: Skeleton, mesh: Mesh) -> GRPOState:
    return grpo_state(abstract_state(config, skeleton, mesh), config)


def grpo_state_specs(config: Config, skeleton: Skeleton, mesh: Mesh) -> GRPOState:
    return grpo_state(state_specs(config, skeleton, mesh), config)


def with_fresh_reference(state: GRPOState) -> GRPOState:
    """The policy as its own reference, in arrays of its own: the step consumes those of its state."""
    return state._replace(reference=jax.tree.map(jnp.copy, state.parameters) if state.reference else {})
