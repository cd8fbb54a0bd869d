"""DeepSeek-V3: the map of the model.

    tokens -> embed -> dense blocks -> MoE blocks (router -> dispatch -> experts -> combine, plus shared expert)
           -> norm -> head -> logits
    MTP branch: [embed(next token) ; hidden] -> block -> norm -> the same head -> logits one token further

Dimension letters, in names and einsums:
    B batch                 S sequence              T key positions         N tokens (B * S)
    D width                 H heads                 Q query latent          C key-value latent
    P no-rope head dim      R rope head dim         V value head dim        L layers
    E experts               K experts a token       G groups                F feed-forward width
    W vocabulary            M rows (N * K)          X cache width (C + R)
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.config_checks import check_model
from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import Latents, PagedLatents, empty
from dsv3_jax.model.layers import RMSNorm, RouterBias, contract, parameter, scan_stack, stack, whole
from dsv3_jax.model.moe import MixtureOfExperts, RouterStatistics
from dsv3_jax.model.mtp import MultiTokenPrediction
from dsv3_jax.model.rope import rotation
from dsv3_jax.model_config import ModelConfig
from sharding.collectives import axis_index, axis_size, looked_up, summed
from sharding.context import CONTEXT_AXES, context_part
from sharding.rules import TENSOR_AXES, stored_dim

# [L, B, T, C + R] of every stack of blocks; of an unstacked one a list of [B, T, C + R]: a layer that is cut out of an
# array of all is copied, which with few rows takes longer than what is done with it. Those may be paged (cache.py).
Cache = list[Array | list[Array] | list[PagedLatents]]


class Transformer(nnx.Module):
    """The main model and its MTP modules. `Transformer(config.model, rngs=nnx.Rngs(seed))`; inside `nnx.eval_shape`
    nothing is allocated. Raises ConfigError for a shape that cannot be built."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        check_model(model)
        self.embedding = parameter(
            rngs, (model.vocabulary, model.width), ("vocabulary", "width"), model.initializer_std
        )
        if model.dense_layers:
            self.dense_blocks = stack(partial(Block, model, dense=True), model.dense_layers, rngs)
        if model.moe_layers:
            self.moe_blocks = stack(partial(Block, model, dense=False), model.moe_layers, rngs)
        self.norm = RMSNorm(model.width, model.norm_epsilon)
        self.head = parameter(rngs, (model.width, model.vocabulary), ("width", "vocabulary"), model.initializer_std)
        self.mtp = nnx.List([MultiTokenPrediction(model, rngs) for _ in range(model.mtp_depth)])
        self.model = model

    @jax.jit
    def __call__(
        self, tokens_BS: Array, positions_BS: Array | None = None, segment_ids_BS: Array | None = None
    ) -> Array:
        """Logits of the next token, float32 [B, S, W], of int32 tokens [B, S].

        Positions are 0, 1, ... in every row unless given; segment ids, if given, isolate documents.
        """
        hidden_BSD, _ = self.hidden_states(tokens_BS, positions_BS, segment_ids_BS)
        return self.logits(self.norm(hidden_BSD))

    def hidden_states(
        self,
        tokens_BS: Array,
        positions_BS: Array | None = None,
        segment_ids_BS: Array | None = None,
        valid_BS: Array | None = None,
        replayed_BSLK: Array | None = None,
    ) -> tuple[Array, RouterStatistics | None]:
        """The residual stream after the last block, before the final norm, and the MoE blocks' statistics.

        `valid_BS` marks the tokens that count in the statistics; by default all. `replayed_BSLK` are the experts that
        every MoE block is to send each token to, as `prefill` and `decode` tell them (Router).
        """
        by = rotation(self.model, _positions(tokens_BS, positions_BS))
        valid_BS = jnp.ones(tokens_BS.shape, bool) if valid_BS is None else valid_BS

        def body(block: Block, x_BSD: Array, replayed_BSK: Array | None):
            x_BSD, _, statistics = block(x_BSD, by, segment_ids_BS, valid_BS, replayed_BSK)
            return x_BSD, statistics

        x_BSD, statistics = self.embed(tokens_BS), None
        replayed_LBSK = None if replayed_BSLK is None else jnp.moveaxis(replayed_BSLK, 2, 0)
        for blocks in self.stacks():
            replayed = replayed_LBSK if blocks is getattr(self, "moe_blocks", None) else None
            x_BSD, statistics = scan_stack(blocks, body, x_BSD, replayed, remat=self.model.recomputed)
        return x_BSD, statistics

    def mtp_states(
        self,
        hidden_BSD: Array,
        following_BSk: Array,
        positions_BS: Array | None = None,
        segment_ids_BS: Array | None = None,
        valid_BSk: Array | None = None,
    ) -> tuple[list[Array], list[RouterStatistics]]:
        """Hidden states of every MTP module, each [B, S, D] and ready for the head, and its statistics.

        Args:
            hidden_BSD: what `hidden_states` returned.
            following_BSk: int32 [B, S, mtp_depth], the token k after each position, k = 1, 2, ...; any id where there
                is none: causality keeps it from the positions before.
            positions_BS, segment_ids_BS: as in the main model.
            valid_BSk: bool [B, S, mtp_depth], positions that count in module k's statistics.
        """
        by = rotation(self.model, _positions(hidden_BSD, positions_BS))
        valid_BSk = jnp.ones(following_BSk.shape, bool) if valid_BSk is None else valid_BSk
        states, statistics = [], []
        state_BSD = self.drafting_state(hidden_BSD)
        for depth, module in enumerate(self.mtp):
            embedded_BSD = self.embed(following_BSk[:, :, depth])
            state_BSD, of_module = module(state_BSD, embedded_BSD, by, segment_ids_BS, valid_BSk[:, :, depth])
            states.append(state_BSD)
            statistics.append(of_module)
        return states, statistics

    def prefill(self, tokens_BS: Array, cache: Cache) -> tuple[Array, Cache, Array]:
        """Rows from position 0 on.

        Returns the residual stream, the cache with entries 0 .. S - 1 written, and the experts as `decode` does.
        """
        by = rotation(self.model, _positions(tokens_BS, None))
        valid_BS = jnp.ones(tokens_BS.shape, bool)

        def body(block: Block, x_BSD: Array, cache_BTX: Array):
            x_BSD, latent_BSX, statistics = block(x_BSD, by, None, valid_BS)
            cache_BTX = jax.lax.dynamic_update_slice(cache_BTX, latent_BSX.astype(cache_BTX.dtype), (0, 0, 0))
            return x_BSD, cache_BTX, None if statistics is None else statistics.experts_BSK

        x_BSD, cache, experts = self._scan_with_cache(body, self.embed(tokens_BS), cache)
        return x_BSD, cache, self._experts_BSLK(tokens_BS, experts)

    def decode(self, tokens_BS: Array, cache: Cache, positions_BS: Array) -> tuple[Array, Cache, Array]:
        """New tokens at `positions_BS` against the cache. A position outside the cache is not written.

        Returns their residual stream, the cache with them in it, and the experts that each was sent to in every MoE
        block, int32 [B, S, L, K] in the routers' order: those that had a part in predicting the token after it.
        """
        by = rotation(self.model, positions_BS)

        def body(block: Block, x_BSD: Array, cache: Latents):
            return block.decode(x_BSD, by, cache, positions_BS)

        x_BSD, cache, experts = self._scan_with_cache(body, self.embed(tokens_BS), cache)
        return x_BSD, cache, self._experts_BSLK(tokens_BS, experts)

    def drafting_state(self, hidden_BSD: Array) -> Array:
        """What the first MTP module takes of the residual stream that `prefill` and `decode` return."""
        return self.norm(hidden_BSD) if self.model.mtp_input == "final_norm" else hidden_BSD

    def draft_prefill(self, state_BSD: Array, following_BS: Array, cache_BTX: Array) -> tuple[Array, Array]:
        """States of the first MTP module over rows from position 0 on, ready for the head, and its cache with them.

        Args:
            state_BSD: `drafting_state` of the rows.
            following_BS: int32, the token after each position; any where there is none, as no position before sees it.
            cache_BTX: of `empty_draft_cache`.
        """
        by = rotation(self.model, _positions(state_BSD, None))
        return self.mtp[0].prefill(state_BSD, self.embed(following_BS), by, cache_BTX)

    def draft(
        self, state_BSD: Array, following_BS: Array, cache: Latents, positions_BS: Array
    ) -> tuple[Array, Latents]:
        """The same at new positions. Returns the states and the cache with them in it.

        From state i and token i + 1 it predicts token i + 2. Its own state i, and that token, stand in for the model's
        state i + 1 to predict one more. A position outside the cache is not written.
        """
        by = rotation(self.model, positions_BS)
        return self.mtp[0].decode(state_BSD, self.embed(following_BS), by, cache, positions_BS)

    def empty_draft_cache(self, batch: int, length: int) -> Array:
        """As `empty_cache`, of the first MTP module: [B, T, C + R]."""
        return empty(batch, length, self.model.cache_width, dtype=self.model.dtype)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Each token's normed latent and rotated key a layer, C + R numbers in the compute type, nothing else."""
        shape, dtype = (batch, length, self.model.cache_width), self.model.dtype
        counts = [count for count in (self.model.dense_layers, self.model.moe_layers) if count]
        return [
            [empty(*shape, dtype=dtype) for _ in range(count)]
            if isinstance(blocks, nnx.List)
            else empty(count, *shape, dtype=dtype)
            for blocks, count in zip(self.stacks(), counts, strict=True)
        ]

    def router_biases(self) -> list[RouterBias]:
        """Every selection bias: [L, E] of the MoE blocks, then [E] of each MTP module; none in a model without."""
        if not self.model.selection_bias:
            return []
        blocks = [*self.stacks(), *(module.block for module in self.mtp)]
        networks = [block.feed_forward for block in blocks]
        return [network.router.bias for network in networks if isinstance(network, MixtureOfExperts)]

    def embed(self, tokens_BS: Array) -> Array:
        """The residual stream's first value, [B, S, D]."""
        dtype, table_WD = jnp.dtype(self.model.dtype), self.embedding[...]
        stored = stored_dim(self.embedding.get_metadata("logical_axes"))
        stored_axes = stored.axes if stored else ()
        if axis_size(TENSOR_AXES) == 1:
            return looked_up(table_WD, tokens_BS, stored_axes).astype(dtype)
        # This device's part of the vocabulary; every token is in one of them.
        row_BS = tokens_BS - axis_index(TENSOR_AXES) * table_WD.shape[0]
        found_BSD = looked_up(table_WD, jnp.clip(row_BS, 0, table_WD.shape[0] - 1), stored_axes)
        mine_BS1 = ((row_BS >= 0) & (row_BS < table_WD.shape[0]))[..., None]
        return summed(jnp.where(mine_BS1, found_BSD, 0), TENSOR_AXES).astype(dtype)

    def logits(self, hidden_BSD: Array) -> Array:
        """Head on normed hidden states: float32 [B, S, W]."""
        dtype = jnp.dtype(self.model.dtype)
        return contract("bsd,dw->bsw", hidden_BSD, whole(self.head, dtype), dtype, jnp.dtype(jnp.float32))

    def stacks(self) -> list[Block]:
        """The dense blocks, then the MoE blocks; a stack without layers is left out."""
        return [getattr(self, name) for name in ("dense_blocks", "moe_blocks") if hasattr(self, name)]

    def _experts_BSLK(self, tokens_BS: Array, of_stacks: list) -> Array:
        """Of what `_scan_with_cache` returns of every stack; of a model without MoE blocks, none."""
        if not self.model.moe_layers:
            return jnp.zeros((*tokens_BS.shape, 0, self.model.experts_per_token), jnp.int32)
        return jnp.stack([*of_stacks[-1]], axis=2)

    def _scan_with_cache(self, body, x_BSD: Array, cache: Cache) -> tuple[Array, Cache, list]:
        """`body(block, x_BSD, cache_BTX)`, which returns both after it and one thing more, over all layers.

        Returns also that of every stack, a list or with a leading "layers" dim.
        """
        written: Cache = []
        more = []
        for blocks, layers in zip(self.stacks(), cache, strict=True):
            if isinstance(blocks, nnx.List):

                def by_itself(block: Block, x_BSD: Array, cache: Latents):
                    x_BSD, cache, of_layer = body(block, x_BSD, cache)
                    return x_BSD, (cache, of_layer)

                x_BSD, outputs = scan_stack(blocks, by_itself, x_BSD, layers)
                after, of_stack = map(list, zip(*outputs, strict=True))
            else:

                def in_place(block: Block, carry, layer: Array):
                    x_BSD, cache_BTX, of_layer = body(block, carry[0], carry[1][layer])
                    return (x_BSD, carry[1].at[layer].set(cache_BTX)), of_layer

                (x_BSD, after), of_stack = scan_stack(blocks, in_place, (x_BSD, layers), jnp.arange(len(layers)))
            written.append(after)
            more.append(of_stack)
        return x_BSD, written, more


def _positions(rows: Array, positions_BS: Array | None) -> Array:
    """int32 positions [B or 1, S], counting from 0 unless given; this device's, where rows are divided over several."""
    if positions_BS is not None:
        return positions_BS
    return context_part(jnp.arange(rows.shape[1] * axis_size(CONTEXT_AXES), dtype=jnp.int32)[None])
