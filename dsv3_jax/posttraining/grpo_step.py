"""One update of GRPO: a pure function from state and packed responses to state and metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, Tree, parameter_specs, put_together
from dsv3_jax.model.layers import whole
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.posttraining.grpo_batch import GRPOBatch
from dsv3_jax.posttraining.grpo_loss import LossSums, grpo_loss
from dsv3_jax.posttraining.grpo_state import GRPOState, grpo_state_specs
from dsv3_jax.training.accumulation import accumulated, chosen, clipped, global_norm, stepped
from dsv3_jax.training.cross_entropy import cross_entropy
from dsv3_jax.training.optimizer import adamw
from dsv3_jax.training.schedules import learning_rate, loss_weights
from dsv3_jax.training.token_logprobs import TokenLogprobs, token_logprobs
from sharding.collectives import spread_like, summed
from sharding.mesh import ROW_AXES, on_mesh, row_spec


class GRPOMetrics(NamedTuple):
    """What one update measured."""

    sums: LossSums
    mtp_loss: Array
    """[mtp_depth], nats a token."""
    gradient_norm: Array
    """Of the main model, before clipping."""
    learning_rate: Array
    finite: Array
    """bool; False: the state was left as it was."""


GRPOStep = Callable[[GRPOState, GRPOBatch, Any], tuple[GRPOState, GRPOMetrics]]
Scorer = Callable[[Tree, Tree, GRPOBatch, Any], Array]


def make_grpo_step(config: Config, skeleton: Skeleton, mesh: Mesh, known_W: np.ndarray) -> jax.stages.Wrapped:
    """The jitted update, of state, a batch [batch_size, sequence_length] and the int32 number of its microbatches that
    hold anything; it consumes its state's buffers.

    `known_W` marks the ids that the sampler can draw.
    """
    optimizer, steps, depth = adamw(config, skeleton), config.training.steps, mtp_depth(config)

    def update(state: GRPOState, batch: GRPOBatch, used: Array) -> tuple[GRPOState, GRPOMetrics]:
        weight = loss_weights(state.step, config.loss, steps).mtp
        counts_k = jnp.maximum(summed(mtp_targets(batch, depth)[1].sum((0, 1)), ROW_AXES), 1)

        def part_loss(parameters: Tree, part: GRPOBatch) -> tuple[Array, tuple[LossSums, Array]]:
            model = put_together(skeleton, parameters, state.router_bias)
            hidden_BSD, scores = policy(model, part, config, known_W)
            sums = grpo_loss(scores.logprobs_N, scores.entropies_N, part.values, config.grpo)
            if not depth:
                return sums.loss, (sums, spread_like(jnp.zeros((0,), jnp.float32), hidden_BSD))
            detached = put_together(skeleton, without_trunk(parameters), state.router_bias)
            mtp_k = mtp_loss_sums(detached, jax.lax.stop_gradient(hidden_BSD), part) / counts_k
            return sums.loss + weight * mtp_k.mean(), (sums, mtp_k)

        gradients, (sums, mtp_k) = accumulated(part_loss, state.parameters, batch, config.training.microbatches, used)
        # Each clipped by itself: the MTP loss is to leave no trace in the policy.
        of_policy = {name: tree for name, tree in gradients.items() if name != "mtp"}
        of_mtp = {name: tree for name, tree in gradients.items() if name == "mtp"}
        norm, norm_of_mtp, most = global_norm(of_policy), global_norm(of_mtp), config.optimizer.clip_norm
        finite = jnp.isfinite(norm) & jnp.isfinite(norm_of_mtp) & jnp.isfinite(sums.loss)
        gradients = clipped(of_policy, norm, most) | clipped(of_mtp, norm_of_mtp, most)
        parameters, optimizer_state = stepped(optimizer, gradients, state.optimizer, state.parameters)
        moved = state._replace(step=state.step + 1, parameters=parameters, optimizer=optimizer_state)
        rate = learning_rate(state.step, config.optimizer, steps)
        return chosen(finite, moved, state), GRPOMetrics(sums, mtp_k, norm, rate, finite)

    specs = grpo_state_specs(config, skeleton, mesh)
    on_devices = on_mesh(update, mesh, (specs, row_spec(mesh), PartitionSpec()), (specs, PartitionSpec()))
    return jax.jit(on_devices, donate_argnums=0)


def mtp_depth(config: Config) -> int:
    """MTP modules that are trained: none where their loss has no weight."""
    return config.model.mtp_depth if max(config.loss.mtp_weight, config.loss.mtp_late_weight) > 0 else 0


def make_scorer(config: Config, skeleton: Skeleton, mesh: Mesh, known_W: np.ndarray) -> jax.stages.Wrapped:
    """A jitted function of parameters, router bias, a batch and its number of microbatches: log probabilities of all
    labels, float32 [B, S]."""

    def score(parameters: Tree, router_bias: Tree, batch: GRPOBatch, used: Array) -> Array:
        model, count = put_together(skeleton, parameters, router_bias), config.training.microbatches
        parts = jax.tree.map(lambda rows: rows.reshape(count, -1, *rows.shape[1:]), batch)

        def add(index: Array, scores: Array) -> Array:
            _, of_part = policy(model, jax.tree.map(lambda rows: rows[index], parts), config, known_W)
            return scores.at[index].set(of_part.logprobs_N)

        start = spread_like(jnp.zeros(parts.tokens.shape, jnp.float32), batch.tokens)
        return jax.lax.fori_loop(0, used, add, start).reshape(batch.tokens.shape)

    specs = (*parameter_specs(skeleton, mesh), row_spec(mesh), PartitionSpec())
    return jax.jit(on_mesh(score, mesh, specs, row_spec(mesh)))


def policy(model: Transformer, batch: GRPOBatch, config: Config, known_W: np.ndarray) -> tuple[Array, TokenLogprobs]:
    """The residual stream [B, S, D], and log probabilities of the labels and entropies, [B, S] each.

    With the routing of the rollout: of two nearly equal scores a sampler and a trainer may find another the larger, and
    one other expert makes a token as improbable as another policy would.
    """
    replayed = config.grpo.replay_routing and config.model.moe_layers > 0
    hidden_BSD, _ = model.hidden_states(
        batch.tokens, batch.positions, batch.segment_ids, batch.segment_ids > 0, batch.experts if replayed else None
    )
    scores = token_logprobs(
        model.norm(hidden_BSD).reshape(-1, config.model.width),
        whole(model.head, jnp.dtype(config.model.dtype)),
        batch.labels.reshape(-1),
        config.grpo.temperature,
        jnp.asarray(known_W),
    )
    return hidden_BSD, TokenLogprobs(*(each.reshape(batch.labels.shape) for each in scores))


def without_trunk(parameters: Tree) -> Tree:
    """The parameters of which only the MTP modules have a gradient: a policy must not move to be easier to predict."""
    return {name: tree if name == "mtp" else jax.lax.stop_gradient(tree) for name, tree in parameters.items()}


def mtp_loss_sums(model: Transformer, hidden_BSD: Array, batch: GRPOBatch) -> Array:
    """Cross entropy of every MTP module over the response tokens it predicts, summed: float32 [mtp_depth]."""
    config, (following_BSk, counted_BSk) = model.model, mtp_targets(batch, model.model.mtp_depth)
    states, _ = model.mtp_states(hidden_BSD, following_BSk[..., :-1], batch.positions, batch.segment_ids, counted_BSk)
    head_DW = whole(model.head, jnp.dtype(config.dtype))
    losses = [
        cross_entropy(
            state_BSD.reshape(-1, config.width),
            head_DW,
            following_BSk[..., depth + 1].reshape(-1),
            counted_BSk[..., depth].reshape(-1),
        )
        for depth, state_BSD in enumerate(states)
    ]
    return jnp.stack(losses)


def mtp_targets(batch: GRPOBatch, depth: int) -> tuple[Array, Array]:
    """int32 [B, S, depth + 1], tokens 1, 2, ... after each position; bool [B, S, depth], whether token 2, 3, ... after
    it is one of its own response's that counts."""

    def ahead(rows: Array, shift: int) -> Array:
        return jnp.pad(rows[:, shift:], ((0, 0), (0, shift)))

    following = [ahead(batch.labels, shift) for shift in range(depth + 1)]
    counted = [
        ahead(batch.values.counted, shift) & (ahead(batch.segment_ids, shift) == batch.segment_ids)
        for shift in range(1, depth + 1)
    ]
    none = jnp.zeros((*batch.labels.shape, 0), bool)
    return jnp.stack(following, axis=-1), jnp.stack(counted, axis=-1) if counted else none
