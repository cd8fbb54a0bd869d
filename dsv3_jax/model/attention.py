"""Multi-head latent attention, MLA (V2 section 2.1, V3 section 2.1.1).

Training and prefill expand the latent into per-head keys and values; decoding absorbs the expansion into the
query and the output (V2 appendix C), so that it reads only the cached latent. Both compute the same function.
"""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.kernels.attention import absorbed_attention, causal_attention
from dsv3_jax.kernels.context_attention import context_attention
from dsv3_jax.kernels.long_attention import is_long, long_absorbed_attention
from dsv3_jax.model import float8_training
from dsv3_jax.model.cache import Latents, block_multiple, cache_length, read, read_block
from dsv3_jax.model.layers import RMSNorm, contract, kept, multiplied, parameter, whole
from dsv3_jax.model.rope import Rotation, rotate, softmax_scale
from dsv3_jax.model_config import ModelConfig
from sharding.collectives import axis_size, summed
from sharding.context import CONTEXT_AXES, context_whole
from sharding.rules import TENSOR_AXES


class MultiHeadLatentAttention(nnx.Module):
    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        width, heads, std = model.width, model.heads, model.initializer_std
        query_key_dim = model.query_key_head_dim
        if model.query_latent is None:
            self.query = parameter(rngs, (width, heads, query_key_dim), ("width", "heads", "query_key_dim"), std)
        else:
            rank = model.query_latent
            self.query_down = parameter(rngs, (width, rank), ("width", "query_latent"), std)
            self.query_norm = RMSNorm(rank, model.latent_norm_epsilon)
            self.query_up = parameter(rngs, (rank, heads, query_key_dim), ("latent", "heads", "query_key_dim"), std)
        rank = model.key_value_latent
        self.key_value_down = parameter(rngs, (width, model.cache_width), ("width", "key_value_latent_and_rope"), std)
        self.key_value_norm = RMSNorm(rank, model.latent_norm_epsilon)
        self.key_value_up = parameter(
            rngs,
            (rank, heads, model.nope_head_dim + model.value_head_dim),
            ("latent", "heads", "nope_and_value_dim"),
            std,
        )
        self.output = parameter(rngs, (heads, model.value_head_dim, width), ("heads", "value_dim", "width"), std)
        self.dtype = jnp.dtype(model.dtype)
        self.recipe = float8_training.recipe_of(model)
        self.model = model

    def __call__(self, x_BSD: Array, by: Rotation, segment_ids_BS: Array | None) -> tuple[Array, Array]:
        """Causal attention of a whole row over itself.

        Returns the output [B, S, D] and what a cache keeps of the row, [B, S, C + R].
        """
        nope, rank = self.model.nope_head_dim, self.model.key_value_latent
        query_BSHd = jnp.concatenate(self._queries(x_BSD, by), axis=-1)
        latent_BSX = self.latent(x_BSD, by)
        # Of other devices' positions the latents are fetched, a seventieth of the keys and values they expand to in V3.
        latent_BTX = context_whole(latent_BSX)
        # Split, not sliced: the gradient of a split is one concatenation, of two slices two paddings and a sum.
        latent_BTC, key_rope_BTR = jnp.split(latent_BTX, [rank], axis=-1)
        key_value_BTHd = self._contract("bsc,chd->bshd", latent_BTC, self.key_value_up)
        key_nope_BTHP, value_BTHV = jnp.split(key_value_BTHd, [nope], axis=-1)
        key_rope_BTHR = jnp.broadcast_to(key_rope_BTR[:, :, None], (*key_nope_BTHP.shape[:3], self.model.rope_head_dim))
        key_BTHd = jnp.concatenate([key_nope_BTHP, key_rope_BTHR], axis=-1)
        scale, in_12_bits = softmax_scale(self.model), self.recipe is not None
        if axis_size(CONTEXT_AXES) == 1:
            mixed_BSHV = causal_attention(
                query_BSHd, key_BTHd, value_BTHV, scale, segment_ids_BS, in_12_bits=in_12_bits
            )
        else:
            segment_ids = None if segment_ids_BS is None else (segment_ids_BS, context_whole(segment_ids_BS))
            mixed_BSHV = context_attention(query_BSHd, key_BTHd, value_BTHV, scale, segment_ids, in_12_bits=in_12_bits)
        return self._output(mixed_BSHV), latent_BSX

    def decode(self, x_BSD: Array, by: Rotation, cache: Latents, positions_BS: Array) -> Array:
        """Attention of new tokens over the cache, in which their own latents already stand.

        Args:
            x_BSD: the new tokens.
            by: their rotation.
            cache: entries after a token's position do not count.
            positions_BS: int32 position of each new token.
        """
        mixed_BSHC = self._mixed(self._latent_queries(x_BSD, by), cache, positions_BS)
        if hasattr(self, "merged"):
            mixed_BSM = mixed_BSHC.reshape(*x_BSD.shape[:2], -1)
            return summed(self._contract("bsm,md->bsd", mixed_BSM, self.merged[1]), TENSOR_AXES)
        _, value_up_HCV = self._absorbed()
        return self._output(contract("bshc,hcv->bshv", mixed_BSHC, value_up_HCV, self.dtype))

    def _mixed(self, query_BSHX: Array, cache: Latents, positions_BS: Array) -> Array:
        """[B, S, H, C]: a short cache at once, a long one block by block."""
        rank, scale, length = self.model.key_value_latent, softmax_scale(self.model), cache_length(cache)
        batch, new, heads, _ = query_BSHX.shape
        if not is_long(batch * new * heads, length):
            return absorbed_attention(query_BSHX, read(cache, positions_BS), rank, scale, positions_BS)
        block_of = partial(read_block, cache)
        multiple = block_multiple(cache)
        return long_absorbed_attention(query_BSHX, block_of, length, multiple, rank, scale, positions_BS)

    def latent(self, x_BSD: Array, by: Rotation) -> Array:
        """What the cache keeps of each token: the normed latent (C) and the rotated, un-normed shared key (R)."""
        down_BSX = kept(self._contract("bsd,dx->bsx", x_BSD, self.key_value_down), "latent")
        latent_BSC, rope_BSR = jnp.split(down_BSX, [self.model.key_value_latent], axis=-1)
        return jnp.concatenate([self.key_value_norm(latent_BSC), rotate(rope_BSR, by)], axis=-1)

    def keep_absorbed(self) -> None:
        """Keep what `decode` multiplies with, which it otherwise cuts out of `key_value_up` at every token.

        Where that makes no more numbers to read, as in small models, each expansion is merged with the projection next
        to it: two products fewer a layer and token.
        """
        if hasattr(self, "absorbed") or hasattr(self, "merged"):
            return
        key_up_HPC, value_up_HCV = self._absorbed()
        (heads, _, rank), width = key_up_HPC.shape, self.model.width
        query_up, output = self._query_up(), self.output
        inputs = self.model.query_latent or width
        apart = key_up_HPC.size + value_up_HCV.size + heads * inputs * self.model.query_key_head_dim
        apart += heads * self.model.value_head_dim * width
        if self.dtype != jnp.float32 or heads * (inputs * self.model.cache_width + rank * width) > apart:
            latent_axis = _axes_of(self.key_value_up)[0]
            axes = ("heads", "nope_and_value_dim", latent_axis), ("heads", latent_axis, "nope_and_value_dim")
            self.absorbed = _kept((key_up_HPC, value_up_HCV), axes)
            return
        nope_QHP, rope_QHR = jnp.split(whole(query_up, self.dtype), [self.model.nope_head_dim], axis=-1)
        query_QHC = contract("qhp,hpc->qhc", nope_QHP, key_up_HPC, self.dtype)
        query_QHX = jnp.concatenate([query_QHC, rope_QHR], axis=-1)
        output_HCD = contract("hcv,hvd->hcd", value_up_HCV, whole(output, self.dtype), self.dtype)
        axes_of_query = _axes_of(query_up)[0], "heads", "key_value_latent_and_rope"
        axes_of_output = "heads", _axes_of(output)[-1]
        self.merged = _kept((query_QHX, output_HCD.reshape(-1, width)), (axes_of_query, axes_of_output))

    def _absorbed(self) -> tuple[Array, Array]:
        """The expansion to keys [H, P, C] and that to values [H, C, V], a matrix a head."""
        if hasattr(self, "absorbed"):
            key_up, value_up = self.absorbed
            return whole(key_up, self.dtype), whole(value_up, self.dtype)
        up_CHd = whole(self.key_value_up, self.dtype)
        key_up_CHP, value_up_CHV = jnp.split(up_CHd, [self.model.nope_head_dim], axis=-1)
        return key_up_CHP.transpose(1, 2, 0), value_up_CHV.swapaxes(0, 1)

    def _latent_queries(self, x_BSD: Array, by: Rotation) -> Array:
        """What each head asks a cache's entries, [B, S, H, C + R]."""
        if hasattr(self, "merged"):
            query_BSHX = self._contract("bsq,qhx->bshx", self._query_input(x_BSD), self.merged[0])
            query_BSHC, rope_BSHR = jnp.split(query_BSHX, [self.model.key_value_latent], axis=-1)
            return jnp.concatenate([query_BSHC, rotate(rope_BSHR, by)], axis=-1)
        query_nope_BSHP, query_rope_BSHR = self._queries(x_BSD, by)
        query_BSHC = contract("bshp,hpc->bshc", query_nope_BSHP, self._absorbed()[0], self.dtype)
        return jnp.concatenate([query_BSHC, query_rope_BSHR], axis=-1)

    def _queries(self, x_BSD: Array, by: Rotation) -> tuple[Array, Array]:
        """The no-rope part [B, S, H, P] and the rotated part [B, S, H, R] of each head's query."""
        query_BSHd = self._contract("bsq,qhd->bshd", self._query_input(x_BSD), self._query_up())
        nope_BSHP, rope_BSHR = jnp.split(query_BSHd, [self.model.nope_head_dim], axis=-1)
        return nope_BSHP, rotate(rope_BSHR, by)

    def _query_input(self, x_BSD: Array) -> Array:
        """What queries are projected from: their latent [B, S, Q], or x itself in a model without."""
        if self.model.query_latent is None:
            return x_BSD
        return self.query_norm(kept(self._contract("bsd,dq->bsq", x_BSD, self.query_down), "latent"))

    def _query_up(self) -> nnx.Param:
        """To all heads' queries, [Q, H, P + R]; [D, H, P + R] in a model without query latent."""
        return self.query if self.model.query_latent is None else self.query_up

    def _output(self, mixed_BSHV: Array) -> Array:
        """[B, S, D], summed over the heads of every device."""
        return summed(self._contract("bshv,hvd->bsd", mixed_BSHV, self.output, keep_values=True), TENSOR_AXES)

    def _contract(self, equation: str, left: Array, right: nnx.Variable, keep_values: bool = False) -> Array:
        if self.recipe:
            return float8_training.linear(equation, left, right, self.recipe, keep_values=keep_values)
        return multiplied(equation, left, right, self.dtype)


def _axes_of(parameter: nnx.Variable) -> tuple[str, ...]:
    return parameter.get_metadata("logical_axes")


def _kept(matrices: tuple[Array, ...], axes: tuple[tuple[str, ...], ...]) -> nnx.List[nnx.Cache]:
    """Matrices made of parameters, which name their dims as those do."""
    pairs = zip(matrices, axes, strict=True)
    return nnx.List([nnx.Cache(matrix, logical_axes=logical_axes) for matrix, logical_axes in pairs])
