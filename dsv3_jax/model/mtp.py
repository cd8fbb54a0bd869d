"""Multi-token prediction: module k predicts the token k + 1 further on from the state before it (V3 section 2.2)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.model import float8_training
from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import Latents
from dsv3_jax.model.layers import RMSNorm, contract, kept, parameter, recomputed, whole
from dsv3_jax.model.moe import RouterStatistics
from dsv3_jax.model.rope import Rotation
from dsv3_jax.model_config import ModelConfig


class MultiTokenPrediction(nnx.Module):
    """One depth. Embedding and head are the main model's: this module holds neither."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        self.embedding_norm = RMSNorm(model.width, model.norm_epsilon)
        self.hidden_norm = RMSNorm(model.width, model.norm_epsilon)
        self.projection = parameter(
            rngs, (2 * model.width, model.width), ("embedding_and_hidden", "width"), model.initializer_std
        )
        self.block = Block(model, rngs, dense=False)
        self.norm = RMSNorm(model.width, model.norm_epsilon)
        self.model = model

    def __call__(
        self, hidden_BSD: Array, embedded_BSD: Array, by: Rotation, segment_ids_BS: Array | None, valid_BS: Array
    ) -> tuple[Array, RouterStatistics]:
        """Hidden states for the shared head.

        Args:
            hidden_BSD: state at position i: the main model's, or the module's before this one.
            embedded_BSD: embedding of the token at i + k. The token shifts, the position stays i.
            by: rotation of positions i.
            segment_ids_BS: segments of positions i, None for one segment a row.
            valid_BS: positions that have both a token at i + k to embed and one at i + k + 1 to predict.

        Returns:
            [B, S, D], normed by this module's own norm: input of the shared head and of the next module.
        """

        def predict(module: "MultiTokenPrediction", hidden_BSD: Array, embedded_BSD: Array):
            combined_BSD = module.combine(hidden_BSD, embedded_BSD)
            x_BSD, _, statistics = module.block(combined_BSD, by, segment_ids_BS, valid_BS)
            return module.norm(kept(x_BSD, "mtp")), statistics

        structure, state = nnx.split(self)
        return recomputed(lambda state, *inputs: predict(nnx.merge(structure, state), *inputs), self.model.recomputed)(
            state, hidden_BSD, embedded_BSD
        )

    def prefill(self, hidden_BSD: Array, embedded_BSD: Array, by: Rotation, cache_BTX: Array) -> tuple[Array, Array]:
        """As a call on rows from position 0 on. Returns the states and the cache with entries 0 .. S - 1 written."""
        valid_BS = jnp.ones(hidden_BSD.shape[:2], bool)
        x_BSD, latent_BSX, _ = self.block(self.combine(hidden_BSD, embedded_BSD), by, None, valid_BS)
        cache_BTX = jax.lax.dynamic_update_slice(cache_BTX, latent_BSX.astype(cache_BTX.dtype), (0, 0, 0))
        return self.norm(x_BSD), cache_BTX

    def decode(
        self, hidden_BSD: Array, embedded_BSD: Array, by: Rotation, cache: Latents, positions_BS: Array
    ) -> tuple[Array, Latents]:
        """As a call on new positions, against this module's own cache. Returns the states and the cache with them."""
        x_BSD, cache, _ = self.block.decode(self.combine(hidden_BSD, embedded_BSD), by, cache, positions_BS)
        return self.norm(x_BSD), cache

    def combine(self, hidden_BSD: Array, embedded_BSD: Array) -> Array:
        """Project [normed embedding ; normed hidden state].

        Embedding first: the released weights do so, against the order printed in equation 21.
        """
        both = jnp.concatenate([self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD)], axis=-1)
        dtype, recipe = jnp.dtype(self.model.dtype), float8_training.recipe_of(self.model)
        if recipe:
            return kept(float8_training.linear("bsd,de->bse", both, self.projection, recipe), "mtp")
        return kept(contract("bsd,de->bse", both, whole(self.projection, dtype), dtype), "mtp")
