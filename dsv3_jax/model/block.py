"""One transformer block: attention, then a feed-forward network or experts, each behind a norm (V3 figure 2)."""

from flax import nnx
from jax import Array

from dsv3_jax.model.attention import MultiHeadLatentAttention
from dsv3_jax.model.cache import Latents, write
from dsv3_jax.model.layers import FeedForward, RMSNorm, kept
from dsv3_jax.model.moe import MixtureOfExperts, RouterStatistics
from dsv3_jax.model.rope import Rotation
from dsv3_jax.model.router import Routing
from dsv3_jax.model_config import ModelConfig
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
            self.feed_forward = FeedForward(model, model.dense_ffn_width, rngs)
        else:
            self.feed_forward = MixtureOfExperts(model, rngs)
        self.model = model

    def __call__(
        self,
        x_BSD: Array,
        by: Rotation,
        segment_ids_BS: Array | None,
        valid_BS: Array,
        replayed_BSK: Array | None = None,
    ) -> tuple[Array, Array, RouterStatistics | None]:
        """Whole rows. Returns the residual stream, what a cache keeps [B, S, C + R], and a MoE block's statistics.

        `replayed_BSK`: the experts that a MoE block is to send each token to, whatever its router would choose.
        """
        attended_BSD, latent_BSX = self.attention(self.attention_norm(x_BSD), by, segment_ids_BS)
        x_BSD, routing = self._feed(kept(x_BSD + attended_BSD, "attended"), replayed_BSK)
        statistics = None if routing is None else RouterStatistics.of(routing, valid_BS, self.model)
        return x_BSD, latent_BSX, statistics

    def decode(
        self, x_BSD: Array, by: Rotation, cache: Latents, positions_BS: Array
    ) -> tuple[Array, Latents, Array | None]:
        """New tokens against this block's cache.

        Returns the residual stream, the cache with the new tokens' latents written at their positions, and the experts
        that a MoE block chose for each token, int32 [B, S, K] in the router's order.
        """
        normed_BSD = self.attention_norm(x_BSD)
        cache = write(cache, self.attention.latent(normed_BSD, by), positions_BS)
        attended_BSD = self.attention.decode(normed_BSD, by, cache, positions_BS)
        x_BSD, routing = self._feed(x_BSD + attended_BSD)
        return x_BSD, cache, None if routing is None else routing.experts_NK.reshape(*x_BSD.shape[:2], -1)

    def _feed(self, x_BSD: Array, replayed_BSK: Array | None = None) -> tuple[Array, Routing | None]:
        normed_BSD = self.feed_forward_norm(x_BSD)
        if isinstance(self.feed_forward, MixtureOfExperts):
            fed_BSD, routing = self.feed_forward(normed_BSD, replayed_BSK)
        else:
            fed_BSD, routing = self.feed_forward(normed_BSD), None
        return x_BSD + summed(fed_BSD, TENSOR_AXES), routing
