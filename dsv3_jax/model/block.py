"""One transformer block: attention, then a feed-forward network or experts, each behind a norm (V3 figure 2)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import MultiHeadLatentAttention
from dsv3_jax.model.cache import Latents, write
from dsv3_jax.model.layers import FeedForward, RMSNorm, kept
from dsv3_jax.model.moe import MixtureOfExperts, RouterStatistics
from dsv3_jax.model.rope import Rotation
from sharding.collectives import summed
from sharding.rules import TENSOR_AXES


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the residual stream is in the compute type."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs, *, dense: bool):
        self.attention_norm = RMSNorm(model.width, model.norm_epsilon)
        self.attention = MultiHeadLatentAttention(model, rngs)
        self.feed_forward_norm = RMSNorm(model.width, model.norm_epsilon)
        self.feed_forward: FeedForward | MixtureOfExperts
        if dense:
            dtype = jnp.dtype(model.precision)
            self.feed_forward = FeedForward(model.width, model.dense_ffn_width, model.initializer_std, dtype, rngs)
        else:
            self.feed_forward = MixtureOfExperts(model, rngs)

    def __call__(
        self, x_BSD: Array, by: Rotation, segment_ids_BS: Array | None, valid_BS: Array
    ) -> tuple[Array, Array, RouterStatistics | None]:
        """Whole rows. Returns the residual stream, what a cache keeps [B, S, C + R], and a MoE block's statistics."""
        attended_BSD, latent_BSX = self.attention(self.attention_norm(x_BSD), by, segment_ids_BS)
        x_BSD, statistics = self._feed(kept(x_BSD + attended_BSD, "attended"), valid_BS)
        return x_BSD, latent_BSX, statistics

    def decode(self, x_BSD: Array, by: Rotation, cache: Latents, positions_BS: Array) -> tuple[Array, Latents]:
        """New tokens against this block's cache.

        Returns the residual stream and the cache with the new tokens' latents written at their positions.
        """
        normed_BSD = self.attention_norm(x_BSD)
        cache = write(cache, self.attention.latent(normed_BSD, by), positions_BS)
        attended_BSD = self.attention.decode(normed_BSD, by, cache, positions_BS)
        x_BSD, _ = self._feed(x_BSD + attended_BSD, jnp.ones(x_BSD.shape[:2], bool))
        return x_BSD, cache

    def _feed(self, x_BSD: Array, valid_BS: Array) -> tuple[Array, RouterStatistics | None]:
        normed_BSD = self.feed_forward_norm(x_BSD)
        if isinstance(self.feed_forward, MixtureOfExperts):
            fed_BSD, statistics = self.feed_forward(normed_BSD, valid_BS)
        else:
            fed_BSD, statistics = self.feed_forward(normed_BSD), None
        return x_BSD + summed(fed_BSD, TENSOR_AXES), statistics
