"""The compiled steps of the engine: a piece of one prompt into its pages, then tokens of all slots against theirs.

A page table's length, a piece's length and nothing else are shapes: what
requests ask for, who is there and how far they are, are values.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from dsv3_jax.inference.decoding import LONGEST_CHUNK, Rows, Vocabulary, known_logits, next_tokens, with_drafts
from dsv3_jax.inference.engine_slots import (
    Asked,
    Decoded,
    Logprobs,
    Piece,
    Slots,
    only,
    paged,
    with_rows,
)
from dsv3_jax.inference.penalties import History, penalized
from dsv3_jax.inference.placement import EVERYWHERE, ROWS, over
from dsv3_jax.inference.requests import MOST_LOGPROBS
from dsv3_jax.inference.sampling import choose_tokens, log_probabilities
from dsv3_jax.model.cache import NOWHERE
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig
from sharding.collectives import anywhere, spread_like, summed
from sharding.mesh import ROW_AXES


@functools.cache
def compiled_steps(
    structure: jax.tree_util.PyTreeDef, drafts: int, mesh: Mesh | None = None
) -> tuple[Callable, Callable]:
    """`_prefill` and `_decode`, jitted, for models of one structure, which they take as leaves.

    On a mesh each part of the slots takes a piece of its own: pieces and what is returned of them have one dim more, of
    the parts.
    """

    def prefill(model: Transformer, slots: Slots, piece: Piece, vocabulary: Vocabulary) -> Any:
        if mesh is None:
            return _prefill(model, drafts, slots, piece, vocabulary)
        slots, *about_token = _prefill(model, drafts, slots, jax.tree.map(lambda part: part[0], piece), vocabulary)
        return slots, *jax.tree.map(lambda part: part[None], about_token)

    def decode(model: Transformer, slots: Slots, asked: Asked, vocabulary: Vocabulary) -> tuple[Slots, Decoded]:
        return _decode(model, drafts, slots, asked, vocabulary)

    asked = Asked(ROWS, ROWS, EVERYWHERE, EVERYWHERE, EVERYWHERE)
    decoded = Decoded(ROWS, ROWS, ROWS, ROWS, EVERYWHERE, EVERYWHERE)
    steps = (
        over(mesh, structure, prefill, (ROWS, ROWS, EVERYWHERE), ROWS),
        over(mesh, structure, decode, (ROWS, asked, EVERYWHERE), (ROWS, decoded)),
    )
    return jax.jit(steps[0], donate_argnums=1), jax.jit(steps[1], donate_argnums=1)


def _prefill(
    model: Transformer, drafts: int, slots: Slots, piece: Piece, vocabulary: Vocabulary
) -> tuple[Slots, Array, Logprobs, Array]:
    """A piece of a prompt into the slot's pages. Returns also the token after it, int32, its log probabilities, and the
    experts that made it, int32 [L, K].

    Every piece leaves the slot as if it were the last one; the last one does.
    """
    place_1S = jnp.arange(len(piece.tokens_S))[None]
    positions_1S = jnp.where(place_1S < piece.length, piece.start + place_1S, NOWHERE)
    cache, draft_cache = paged(slots, piece.table_G[None])
    hidden_1SD, cache, experts_1SLK = model.decode(piece.tokens_S[None], cache, positions_1S)
    last_111 = (piece.length - 1)[None, None, None]
    logits_11W = known_logits(model, model.norm(jnp.take_along_axis(hidden_1SD, last_111, axis=1)), vocabulary)
    history = History(piece.prompt_W[None], jnp.zeros((1, len(piece.prompt_W)), jnp.int32))
    after_1 = (piece.start + piece.length)[None]
    token_1 = choose_tokens(penalized(logits_11W[:, 0], piece.inputs, history), piece.inputs, after_1)
    history = history.with_tokens(token_1, jnp.ones(1, bool))
    rows = Rows(cache, token_1, after_1, None, None, history)
    if draft_cache is not None:
        newest_1S = (place_1S == piece.length - 1) & piece.is_last
        following_1S = jnp.where(newest_1S, token_1, piece.following_S)
        state_1SD, draft_cache = model.draft(model.drafting_state(hidden_1SD), following_1S, draft_cache, positions_1S)
        state_11D = jnp.take_along_axis(state_1SD, last_111, axis=1)
        rows = with_drafts(model, rows, drafts, state_11D, draft_cache, piece.inputs, vocabulary)

    def placed(column_B: Array, value_1: Array) -> Array:
        return column_B.at[piece.slot].set(value_1[0])

    slots = with_rows(slots, rows)._replace(
        tokens_B=placed(slots.tokens_B, token_1),
        positions_B=placed(slots.positions_B, after_1),
        drafts=jax.tree.map(placed, slots.drafts, rows.drafts),
        history=jax.tree.map(placed, slots.history, rows.history),
        inputs=jax.tree.map(placed, slots.inputs, piece.inputs),
        ends_BW=placed(slots.ends_BW, piece.ends_W[None]),
    )
    logprobs = jax.tree.map(lambda of_11: of_11[0, 0], _logprobs(logits_11W, token_1[None], piece.wants_logprobs))
    return slots, token_1[0], logprobs, experts_1SLK[0, piece.length - 1]


def _decode(
    model: Transformer, drafts: int, slots: Slots, asked: Asked, vocabulary: Vocabulary
) -> tuple[Slots, Decoded]:
    """Passes of the model over all slots that have tokens left, each pass up to `drafts + 1` tokens a slot."""
    active_B = asked.left_B > 0
    inputs = only(slots.inputs, active_B)
    cache, draft_cache = paged(slots, asked.table_BG)
    rows = Rows(cache, slots.tokens_B, slots.positions_B, draft_cache, slots.drafts, slots.history)

    def goes_on(carry: tuple[Rows, Array, Array, Decoded]) -> Array:
        _, left_B, step, _ = carry
        ended = anywhere(active_B & (left_B == 0))
        return (step < asked.steps) & anywhere(left_B > 0) & ~(asked.until_one_ends & ended)

    def one_pass(carry: tuple[Rows, Array, Array, Decoded]) -> tuple[Rows, Array, Array, Decoded]:
        rows, left_B, step, decoded = carry
        going_B = left_B > 0
        # A slot that does not go on writes nowhere.
        placed = rows._replace(positions_B=jnp.where(going_B, rows.positions_B, NOWHERE))
        new_Bn, accepted_B, logits_BnW, experts_BnLK, after = next_tokens(model, drafts, placed, inputs, vocabulary)
        place_n = jnp.arange(drafts + 1)
        # NaN logits give an id beyond the vocabulary.
        ends_Bn = jnp.take_along_axis(slots.ends_BW, new_Bn, axis=1, mode="clip") | (new_Bn >= slots.ends_BW.shape[1])
        before_Bn = jnp.cumsum(ends_Bn, axis=1) - ends_Bn
        kept_Bn = (place_n <= accepted_B[:, None]) & (place_n < left_B[:, None]) & (before_Bn == 0)
        count_B = kept_Bn.sum(axis=1, dtype=jnp.int32)
        column_Bn = jnp.where(kept_Bn, decoded.count_B[:, None] + place_n, decoded.tokens_BC.shape[1])
        batch_B1 = jnp.arange(len(left_B))[:, None]

        def put(made_BC: Array, new_Bn: Array) -> Array:
            return made_BC.at[batch_B1, column_Bn].set(new_Bn, mode="drop")

        decoded = Decoded(
            put(decoded.tokens_BC, new_Bn),
            decoded.count_B + count_B,
            jax.tree.map(put, decoded.logprobs_BC, _logprobs(logits_BnW, new_Bn, asked.wants_logprobs)),
            put(decoded.experts_BCLK, experts_BnLK),
            decoded.accepted_k + (going_B[:, None] & (place_n[1:] <= accepted_B[:, None])).sum(0, dtype=jnp.int32),
            decoded.passes + going_B.sum(dtype=jnp.int32),
        )
        newest_B = jnp.take_along_axis(new_Bn, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
        rows = after._replace(
            tokens_B=jnp.where(going_B, newest_B, rows.tokens_B), positions_B=rows.positions_B + count_B
        )
        ended_B = (kept_Bn & ends_Bn).any(axis=1)
        return rows, jnp.where(ended_B, 0, left_B - count_B), step + 1, decoded

    empty = _nothing_decoded(len(active_B), drafts, model.model)
    empty = jax.tree.map(lambda part: spread_like(part, active_B), empty)
    rows, _, _, decoded = jax.lax.while_loop(goes_on, one_pass, (rows, asked.left_B, jnp.int32(0), empty))
    assert rows.history is not None
    slots = with_rows(slots, rows)._replace(
        tokens_B=rows.tokens_B, positions_B=rows.positions_B, drafts=rows.drafts, history=rows.history
    )
    accepted_k, passes = summed(decoded.accepted_k, ROW_AXES), summed(decoded.passes, ROW_AXES)
    return slots, decoded._replace(accepted_k=accepted_k, passes=passes)


def _nothing_decoded(batch: int, drafts: int, config: ModelConfig) -> Decoded:
    tokens = batch, LONGEST_CHUNK * (drafts + 1)
    most = *tokens, min(MOST_LOGPROBS, config.vocabulary)
    return Decoded(
        jnp.zeros(tokens, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        Logprobs(jnp.zeros(tokens), jnp.zeros(most, jnp.int32), jnp.zeros(most)),
        jnp.zeros((*tokens, config.moe_layers, config.experts_per_token), jnp.int32),
        jnp.zeros(drafts, jnp.int32),
        jnp.int32(0),
    )


def _logprobs(logits_BnW: Array, tokens_Bn: Array, wanted: Array) -> Logprobs:
    """Zeros unless wanted: to sort out the most probable ids takes longer than a small model's pass."""
    batch, words = tokens_Bn.shape, logits_BnW.shape[-1]

    def computed() -> Logprobs:
        of_rows = log_probabilities(logits_BnW.reshape(-1, words), tokens_Bn.reshape(-1), MOST_LOGPROBS)
        return Logprobs(*(rows.reshape(*batch, *rows.shape[1:]) for rows in of_rows))

    most = *batch, min(MOST_LOGPROBS, words)
    nothing = Logprobs(jnp.zeros(batch), jnp.zeros(most, jnp.int32), jnp.zeros(most))
    nothing = jax.tree.map(lambda part: spread_like(part, logits_BnW), nothing)
    return jax.lax.cond(wanted, computed, lambda: nothing)
