"""The training step: one pure function from state and batch to state and metrics."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, Tree, abstract_trees, initialize, put_together, take_apart
from dsv3_jax.model.router import updated_bias
from dsv3_jax.training.losses import (
    Batch,
    Losses,
    LossWeights,
    loss_counts,
    loss_sums,
    mean_losses,
    objective,
)
from dsv3_jax.training.optimizer import adamw
from dsv3_jax.training.schedules import bias_speed, learning_rate, loss_weights


class TrainState(NamedTuple):
    """Everything a step reads and writes."""

    step: Array
    """int32, optimizer steps done."""
    parameters: Tree
    router_bias: Tree
    optimizer: Any


class StepMetrics(NamedTuple):
    """What one step measured, over its whole batch."""

    losses: Losses
    gradient_norm: Array
    """Before clipping."""
    learning_rate: Array
    loads: list[Array]
    """int32, tokens sent to each expert: [L, E] of the MoE blocks, then [E] of each MTP module."""
    dropped: Array
    """int32, (token, expert) pairs the router chose that no expert received."""
    finite: Array
    """bool; False: the state was left as it was."""


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def initial_state(config: Config, skeleton: Skeleton) -> TrainState:
    """Parameters drawn from the config's seed, zero router biases, a fresh optimizer."""
    return _first_state(config, skeleton, *initialize(config.model, config.seed))


def abstract_state(config: Config, skeleton: Skeleton) -> TrainState:
    """What `initial_state` returns, as ShapeDtypeStructs; allocates nothing."""
    return jax.eval_shape(functools.partial(_first_state, config, skeleton), *abstract_trees(skeleton))


def _first_state(config: Config, skeleton: Skeleton, parameters: Tree, router_bias: Tree) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), parameters, router_bias, adamw(config, skeleton).init(parameters))


def make_train_step(config: Config, skeleton: Skeleton) -> jax.stages.Wrapped:
    """The jitted step for batches of [batch_size, sequence_length + 1]; it consumes its state's buffers."""
    optimizer = adamw(config, skeleton)
    steps = config.training.steps

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        weights = loss_weights(state.step, config.loss, steps)
        losses, loads, gradients = accumulated_gradients(state, batch, weights, config, skeleton)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(objective(losses, weights, config.model))

        def moved(state: TrainState) -> TrainState:
            # A factor, not optax.clip_by_global_norm: that divides, and XLA writes the quotients to memory first.
            clipped = optax.tree.scale(jnp.minimum(1.0, config.optimizer.clip_norm / norm), gradients)
            updates, optimizer_state = optimizer.update(clipped, state.optimizer, state.parameters)
            return TrainState(
                state.step + 1,
                optax.apply_updates(state.parameters, updates),
                update_router_biases(state, loads, bias_speed(state.step, config), skeleton),
                optimizer_state,
            )

        # A step that is not finite leaves no trace: the run stops with a state that is still good.
        state_after = jax.lax.cond(finite, moved, lambda state: state, state)
        rate = learning_rate(state.step, config.optimizer, steps)
        return state_after, StepMetrics(losses, norm, rate, loads, _dropped(loads, batch, config), finite)

    return jax.jit(train_step, donate_argnums=0)


def compile_train_step(config: Config, skeleton: Skeleton) -> TrainStep:
    """`make_train_step`, compiled before there is a state or a batch to call it with."""
    shape = config.training.batch_size, config.training.sequence_length + 1
    batch = jax.eval_shape(lambda: Batch(*[jnp.zeros(shape, jnp.int32)] * 3))
    return make_train_step(config, skeleton).lower(abstract_state(config, skeleton), batch).compile()


def accumulated_gradients(
    state: TrainState, batch: Batch, weights: LossWeights, config: Config, skeleton: Skeleton
) -> tuple[Losses, list[Array], Tree]:
    """Mean losses, loads and gradients of the batch, taken in `microbatches` parts one after the other.

    Every part divides by the counts of the whole batch, so the sum of the parts is the gradient of the whole whatever
    the split and however padding is spread over it.
    """
    counts = loss_counts(batch, config.model.mtp_depth)

    def part_loss(parameters: Tree, part: Batch):
        model = put_together(skeleton, parameters, state.router_bias)
        sums, loads = loss_sums(model, part, isolate_documents=config.data.isolate_documents)
        means = mean_losses(sums, counts, config.model)
        return objective(means, weights, config.model), (means, loads)

    def add_part(total, part: Batch):
        gradients, (means, loads) = jax.grad(part_loss, has_aux=True)(state.parameters, part)
        return jax.tree.map(jnp.add, total, (means, loads, gradients)), None

    parts = jax.tree.map(lambda rows: rows.reshape(config.training.microbatches, -1, rows.shape[-1]), batch)
    one_part = jax.tree.map(lambda rows: rows[0], parts)
    gradients, (means, loads) = jax.eval_shape(jax.grad(part_loss, has_aux=True), state.parameters, one_part)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (means, loads, gradients))
    return jax.lax.scan(add_part, zeros, parts)[0]


def update_router_biases(state: TrainState, loads: list[Array], speed: Array, skeleton: Skeleton) -> Tree:
    """The biases after this step, from the load of the batch just finished (V3 section 2.1.2)."""
    model = put_together(skeleton, state.parameters, state.router_bias)
    for bias, load in zip(model.router_biases(), loads, strict=False):
        bias[...] = updated_bias(bias[...], load, speed)
    return take_apart(model)[1]


def _dropped(loads: list[Array], batch: Batch, config: Config) -> Array:
    counts = loss_counts(batch, config.model.mtp_depth)
    present = (batch.segment_ids[:, :-1] > 0).sum()
    sent = config.model.experts_per_token * (config.model.moe_layers * present + counts.tokens[1:].sum())
    return sent - sum((load.sum() for load in loads), start=jnp.zeros((), jnp.int32))
