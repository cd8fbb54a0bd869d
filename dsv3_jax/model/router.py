"""Which experts a token goes to, and how their load is kept even (V3 section 2.1.2).

The order of the gate matters: weights come from the scores without the bias, the choice from the scores with it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.model.layers import RouterBias, contract, parameter, whole
from dsv3_jax.model_config import ModelConfig
from sharding.collectives import summed
from sharding.context import CONTEXT_AXES


class Routing(NamedTuple):
    """The gate's decision for N tokens."""

    experts_NK: Array
    """int32, the chosen experts."""
    weights_NK: Array
    """float32, their weights, normalised and scaled."""
    scores_NE: Array
    """float32, scores of all experts, without the bias."""


class Router(nnx.Module):
    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        self.weight = parameter(rngs, (model.width, model.experts), ("width", "router_experts"), model.initializer_std)
        if model.selection_bias:
            self.bias = RouterBias(jnp.zeros((model.experts,), jnp.float32), logical_axes=("router_experts",))
        self.model = model

    def __call__(self, x_ND: Array, replayed_NK: Array | None = None) -> Routing:
        """Score, choose and weigh; all of it in float32, whatever the compute type.

        `replayed_NK`: experts that were chosen before and are taken again. Their scores are today's, so that the
        gradient of their weights still reaches the router.
        """
        float32 = jnp.dtype(jnp.float32)
        logits_NE = contract("nd,de->ne", x_ND, whole(self.weight, float32), float32)
        scores_NE = jax.nn.sigmoid(logits_NE) if self.model.score_function == "sigmoid" else jax.nn.softmax(logits_NE)
        if replayed_NK is None:
            selection_NE = scores_NE + self.bias[...] if self.model.selection_bias else scores_NE
            experts_NK = choose_experts(jax.lax.stop_gradient(selection_NE), self.model)
        else:
            experts_NK = replayed_NK.astype(jnp.int32)
        weights_NK = jnp.take_along_axis(scores_NE, experts_NK, axis=-1)
        if self.model.normalize_weights:
            weights_NK = weights_NK / (weights_NK.sum(axis=-1, keepdims=True) + 1e-20)
        return Routing(experts_NK, weights_NK * self.model.routed_scale, scores_NE)


def choose_experts(selection_NE: Array, model: ModelConfig) -> Array:
    """Top-k experts of the selection scores within each token's best groups, int32 [N, K]."""
    if model.groups_per_token < model.expert_groups:
        grouped_NGe = selection_NE.reshape(selection_NE.shape[0], model.expert_groups, -1)
        if model.group_score == "top2_sum":
            group_NG = jax.lax.top_k(grouped_NGe, 2)[0].sum(axis=-1)
        else:
            group_NG = grouped_NGe.max(axis=-1)
        groups = jax.lax.top_k(group_NG, model.groups_per_token)[1]
        kept_NG = (groups[:, :, None] == jnp.arange(model.expert_groups)).any(axis=1)
        # -inf, not 0: with a negative bias a kept expert may score below 0, and one of a dropped group would win.
        selection_NE = jnp.where(kept_NG[:, :, None], grouped_NGe, -jnp.inf).reshape(selection_NE.shape)
    return jax.lax.top_k(selection_NE, model.experts_per_token)[1].astype(jnp.int32)


def expert_load(experts_NK: Array, valid_N: Array, experts: int) -> Array:
    """Tokens sent to each expert, int32 [E], padding not counted.

    Integers, because a rounded count can flip the sign of a bias update.
    """
    chosen_NE = (experts_NK[:, :, None] == jnp.arange(experts)).any(axis=1)
    return jnp.sum(chosen_NE & valid_N[:, None], axis=0, dtype=jnp.int32)


def balance_loss(routing: Routing, valid_BS: Array, model: ModelConfig) -> Array:
    """Sequence-wise balance loss without its weight, summed over the rows (V3 equations 17-20), float32 scalar.

    A balanced row gives 1. f counts the gate's real selections, as practice does, where equation 18 as printed
    counts the top-k of the scores without bias or group limit; the two agree when both are inactive. Padding is
    left out of both factors; a row of padding gives 0.
    """
    rows, sequence = valid_BS.shape
    scores_BSE = routing.scores_NE.reshape(rows, sequence, model.experts)
    chosen_BSE = (routing.experts_NK[:, :, None] == jnp.arange(model.experts)).any(axis=1).reshape(scores_BSE.shape)
    # Of a row divided over devices, the share is of all its positions, the probability this device's part of the sum.
    length_B1 = jnp.maximum(summed(valid_BS.sum(axis=1, keepdims=True), CONTEXT_AXES), 1)
    share_BE = summed(jnp.sum(chosen_BSE & valid_BS[..., None], axis=1), CONTEXT_AXES) * (
        model.experts / (model.experts_per_token * length_B1)
    )
    normalized_BSE = scores_BSE / (scores_BSE.sum(axis=-1, keepdims=True) + 1e-20)
    probability_BE = jnp.sum(normalized_BSE * valid_BS[..., None], axis=1) / length_B1
    return jnp.sum(jax.lax.stop_gradient(share_BE) * probability_BE)


def updated_bias(bias_E: Array, load_E: Array, speed: Array | float) -> Array:
    """Bias after one optimizer step: up by `speed` where an expert got less than the mean load, down where more.

    `load_E` int32 [.., E] counts the whole step's batch. The comparison is exact: in integers, and with quotient and
    remainder of the mean, because E times a load of 671B's batches would pass 2^31.
    """
    mean, remainder = jnp.divmod(load_E.sum(axis=-1, keepdims=True), load_E.shape[-1])
    over = load_E > mean
    under = (load_E < mean) | ((load_E == mean) & (remainder > 0))
    return bias_E + speed * (under.astype(jnp.float32) - over.astype(jnp.float32))
