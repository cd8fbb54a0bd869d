"""DeepSeekMoE: route, dispatch, experts, combine, plus the shared expert (DeepSeekMoE section 3, V3 section 2.1.2)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.kernels.float8_matmul import float8_matmul
from dsv3_jax.kernels.grouped_matmul import grouped_matmul
from dsv3_jax.kernels.weighted_swiglu import weighted_swiglu
from dsv3_jax.model import float8_training
from dsv3_jax.model.float8 import Float8Blocks
from dsv3_jax.model.layers import FeedForward, contract, held, kept, parameter
from dsv3_jax.model.router import Router, Routing, balance_loss, expert_load
from dsv3_jax.model_config import ModelConfig
from sharding.collectives import axis_size, spread, spread_like
from sharding.dispatch import Routes, through_experts
from sharding.mesh import platform
from sharding.rules import EXPERT_AXES, TENSOR_AXES

# Up to so many tokens a CPU is faster with every chosen expert applied to all of them than with rows sorted by expert.
FEW_TOKENS = 8


class RouterStatistics(NamedTuple):
    """What one MoE block tells of its routing; stacked over blocks with a leading "layers" dim."""

    load_E: Array
    """int32, tokens sent to each expert, padding not counted."""
    balance: Array
    """float32, sequence-wise balance loss summed over the rows, without its weight."""
    experts_BSK: Array
    """int32, the experts each token was sent to, in the router's order."""

    @classmethod
    def of(cls, routing: Routing, valid_BS: Array, model: ModelConfig) -> "RouterStatistics":
        """Load and balance loss over the valid tokens."""
        load_E = expert_load(routing.experts_NK, valid_BS.reshape(-1), model.experts)
        experts_BSK = routing.experts_NK.reshape(*valid_BS.shape, -1)
        return cls(load_E, balance_loss(routing, valid_BS, model), experts_BSK)


class Experts(nnx.Module):
    """E SwiGLU networks; `answered` applies those of one device to rows."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        shape, hidden, std = (model.experts, model.width), model.expert_ffn_width, model.initializer_std
        self.gate_up = parameter(rngs, (*shape, 2, hidden), ("experts", "expert_width", "gate_up", "expert_ffn"), std)
        self.down = parameter(rngs, (shape[0], hidden, shape[1]), ("experts", "expert_ffn", "expert_width"), std)
        self.dtype = jnp.dtype(model.dtype)
        self.recipe = float8_training.recipe_of(model)

    def matrices(self) -> tuple[Any, Any]:
        """gate_up [e, D, 2, F] and down [e, F, D] of this device's e experts, in the compute type or `held` in FP8.

        Trained in FP8: encoded, gate beside up, as `float8_training.answered` takes them.
        """
        if self.recipe:
            gate_up, down = (float8_training.encoded_matrices(one, 1, self.recipe) for one in (self.gate_up, self.down))
            return gate_up, down
        return held(self.gate_up, self.dtype), held(self.down, self.dtype)


def answered(
    matrices: tuple[Array | Float8Blocks, Array | Float8Blocks], rows_MD: Array, weights_M: Array, group_sizes_e: Array
) -> Array:
    """Each row through its expert, the answer times the row's weight; rows are grouped by expert.

    The result is a sum over this device's part of F, as a FeedForward's is.
    """

    def product(rows: Array, matrix: Array | Float8Blocks) -> Array:
        if isinstance(matrix, Float8Blocks):
            return float8_matmul(rows, matrix, group_sizes_e)
        return grouped_matmul(rows, matrix.reshape(*matrix.shape[:2], -1), group_sizes_e)

    gate_up_eDcF, down_eFD = matrices
    gate_and_up_MG = kept(product(rows_MD, gate_up_eDcF), "swiglu_input")
    return product(weighted_swiglu(gate_and_up_MG, weights_M), down_eFD)


def answered_one_by_one(matrices: tuple[Array, Array], x_ND: Array, weights_NK: Array, experts_NK: Array) -> Array:
    """Each token's weighted sum of its experts' answers, [N, D], of few tokens whose experts are all here.

    Expert after expert, without those that nobody chose: a matrix is fetched once for all tokens. Beside so few of them
    a matrix a row, or rows sorted by expert, would take longer than the products.
    """
    gate_up_EDcF, down_EFD = matrices
    dtype, float32 = gate_up_EDcF.dtype, jnp.dtype(jnp.float32)
    count = gate_up_EDcF.shape[0]
    gate_up_EDG = gate_up_EDcF.reshape(*gate_up_EDcF.shape[:2], -1)
    zeros_ND = spread_like(jnp.zeros(x_ND.shape, float32), x_ND, gate_up_EDG, weights_NK)

    def answer(expert: Array, weights_N: Array) -> Array:
        gate_and_up_NG = contract("nd,dg->ng", x_ND, gate_up_EDG[expert], dtype)
        return contract("nf,fd->nd", weighted_swiglu(gate_and_up_NG, weights_N), down_EFD[expert], dtype, float32)

    if len(x_ND) == 1:
        # Every choice is needed: without a condition `small` decodes 1.1 times as fast.
        def add_choice(choice: Array, sum_ND: Array) -> Array:
            return sum_ND + answer(experts_NK[0, choice], weights_NK[:, choice])

        return jax.lax.fori_loop(0, experts_NK.shape[1], add_choice, zeros_ND).astype(x_ND.dtype)
    weights_NE = jnp.where(experts_NK[:, :, None] == jnp.arange(count), weights_NK[:, :, None], 0).sum(axis=1)

    def add_expert(expert: Array, sum_ND: Array) -> Array:
        weights_N = weights_NE[:, expert]
        return jax.lax.cond((weights_N != 0).any(), lambda: sum_ND + answer(expert, weights_N), lambda: sum_ND)

    return jax.lax.fori_loop(0, count, add_expert, zeros_ND).astype(x_ND.dtype)


class MixtureOfExperts(nnx.Module):
    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        self.router = Router(model, rngs)
        self.experts = Experts(model, rngs)
        if model.shared_experts:
            self.shared = FeedForward(model, model.shared_experts * model.expert_ffn_width, rngs)
        self.model = model

    def __call__(self, x_BSD: Array, replayed_BSK: Array | None = None) -> tuple[Array, Routing]:
        """The block's output [B, S, D] and the routing of its N = B * S tokens, to `replayed_BSK` where given.

        Every token passes through all its experts: there is no capacity and nothing is dropped. The output is a sum
        over this device's part of the experts' widths, as a FeedForward's is.
        """
        model = self.model
        replayed_NK = None if replayed_BSK is None else replayed_BSK.reshape(-1, model.experts_per_token)
        routing = self.router(x_BSD.reshape(-1, model.width), replayed_NK)
        x_BSD, weights_NK = spread(x_BSD, TENSOR_AXES), spread(routing.weights_NK, TENSOR_AXES)
        out_ND = self._routed(x_BSD.reshape(-1, model.width), weights_NK, routing.experts_NK)
        out_BSD = out_ND.reshape(x_BSD.shape)
        if model.shared_experts:
            out_BSD = out_BSD + self.shared(x_BSD)
        return out_BSD, routing

    def _routed(self, x_ND: Array, weights_NK: Array, experts_NK: Array) -> Array:
        model, matrices, recipe = self.model, self.experts.matrices(), self.experts.recipe
        if len(x_ND) <= FEW_TOKENS and axis_size(EXPERT_AXES) == 1 and platform() == "cpu" and recipe is None:
            return answered_one_by_one(matrices, x_ND, weights_NK, experts_NK)
        routes = Routes(
            model.experts,
            model.expert_groups,
            model.groups_per_token,
            model.dispatch_factor,
            model.dispatch_once_a_node,
        )
        if recipe is None:
            return through_experts(answered, matrices, x_ND, weights_NK, experts_NK, routes)
        routes = routes._replace(wire=float8_training.wire(model.width, x_ND.dtype, recipe))
        in_float8 = functools.partial(float8_training.answered, recipe)
        rows_ND = float8_training.rows_for_experts(x_ND, recipe)
        return through_experts(in_float8, matrices, rows_ND, weights_NK, experts_NK, routes)
