"""The training step: one pure function from state and batch to state and metrics."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, Tree, parameter_specs, put_together, take_apart
from dsv3_jax.model.router import updated_bias
from dsv3_jax.training.accumulation import accumulated, chosen, clipped, global_norm, stepped
from dsv3_jax.training.distillation import Teacher
from dsv3_jax.training.losses import (
    Batch,
    Losses,
    LossWeights,
    TeacherModel,
    loss_counts,
    loss_sums,
    mean_losses,
    objective,
)
from dsv3_jax.training.optimizer import adamw
from dsv3_jax.training.schedules import bias_speed, learning_rate, loss_weights
from dsv3_jax.training.state import TrainState, abstract_state, state_specs
from sharding.collectives import summed
from sharding.mesh import ROW_AXES, on_mesh, row_spec


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


def make_train_step(
    config: Config, skeleton: Skeleton, mesh: Mesh, teacher: Skeleton | None = None
) -> jax.stages.Wrapped:
    """The jitted step for batches of [batch_size, sequence_length + 1]; it consumes its state's buffers.

    It runs on every device of the mesh, with that device's rows and pieces of the state. With a teacher it takes as
    third argument the teacher's two trees.
    """
    optimizer = adamw(config, skeleton)
    steps = config.training.steps

    def train_step(state: TrainState, batch: Batch, *trees: tuple[Tree, Tree]) -> tuple[TrainState, StepMetrics]:
        weights = loss_weights(state.step, config.loss, steps)
        of_teacher = None
        if teacher:
            of_teacher = TeacherModel(put_together(teacher, *trees[0]), config.loss.teacher_temperature)
        losses, loads, gradients = accumulated_gradients(state, batch, weights, config, skeleton, of_teacher)
        norm = global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(objective(losses, weights, config.model))

        gradients = clipped(gradients, norm, config.optimizer.clip_norm)
        parameters, optimizer_state = stepped(optimizer, gradients, state.optimizer, state.parameters)
        moved = TrainState(
            state.step + 1,
            parameters,
            update_router_biases(state, loads, bias_speed(state.step, config), skeleton),
            optimizer_state,
        )
        state_after = chosen(finite, moved, state)
        rate = learning_rate(state.step, config.optimizer, steps)
        return state_after, StepMetrics(losses, norm, rate, loads, _dropped(loads, batch, config), finite)

    specs = state_specs(config, skeleton, mesh)
    of_teacher = [parameter_specs(teacher, mesh)] if teacher else []
    on_devices = on_mesh(train_step, mesh, (specs, row_spec(mesh), *of_teacher), (specs, PartitionSpec()))
    return jax.jit(on_devices, donate_argnums=0)


def compile_train_step(config: Config, skeleton: Skeleton, mesh: Mesh, teacher: Teacher | None = None) -> TrainStep:
    """`make_train_step`, compiled before there is a state or a batch to call it with; the teacher's arrays given."""
    shape = config.training.batch_size, config.training.sequence_length + 1
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, row_spec(mesh)))
    state = abstract_state(config, skeleton, mesh)
    batch = Batch(rows, rows, rows, rows if config.data.kind == "chats" else None)
    if teacher is None:
        return make_train_step(config, skeleton, mesh).lower(state, batch).compile()
    compiled = make_train_step(config, skeleton, mesh, teacher.skeleton).lower(state, batch, teacher.trees).compile()
    return lambda state, batch: compiled(state, batch, teacher.trees)


def accumulated_gradients(
    state: TrainState,
    batch: Batch,
    weights: LossWeights,
    config: Config,
    skeleton: Skeleton,
    teacher: TeacherModel | None = None,
) -> tuple[Losses, list[Array], Tree]:
    """Mean losses, loads and gradients of the batch, taken in `microbatches` parts one after the other.

    Called on every device of a mesh with its rows: losses and loads are of all rows, gradients of this device's pieces.
    Every part divides by the counts of the whole batch, so the sum of the parts is the gradient of the whole whatever
    the split and however padding is spread over it.
    """
    counts = jax.tree.map(lambda count: summed(count, ROW_AXES), loss_counts(batch, config.model.mtp_depth))

    def part_loss(parameters: Tree, part: Batch) -> tuple[Array, tuple[Losses, list[Array]]]:
        model = put_together(skeleton, parameters, state.router_bias)
        sums, loads = loss_sums(model, part, isolate_documents=config.data.isolated, teacher=teacher)
        means = mean_losses(sums, counts, config.model)
        return objective(means, weights, config.model), (means, loads)

    gradients, (means, loads) = accumulated(part_loss, state.parameters, batch, config.training.microbatches)
    return means, loads, gradients


def update_router_biases(state: TrainState, loads: list[Array], speed: Array, skeleton: Skeleton) -> Tree:
    """The biases after this step, from the load of the batch just finished (V3 section 2.1.2)."""
    model = put_together(skeleton, state.parameters, state.router_bias)
    for bias, load in zip(model.router_biases(), loads, strict=False):
        bias[...] = updated_bias(bias[...], load, speed)
    return take_apart(model)[1]


def _dropped(loads: list[Array], batch: Batch, config: Config) -> Array:
    counts = loss_counts(batch, config.model.mtp_depth)
    present = (batch.segment_ids[:, :-1] > 0).sum()
    sent = summed(
        config.model.experts_per_token * (config.model.moe_layers * present + counts.tokens[1:].sum()), ROW_AXES
    )
    return sent - sum((load.sum() for load in loads), start=jnp.zeros((), jnp.int32))
