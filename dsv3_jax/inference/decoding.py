"""The compiled part of generation: prompts into a cache, then tokens against it, a chunk of them at a time.

With drafts (speculation.py) a pass of the model takes the newest token and the tokens that its MTP module has guessed
to follow, and yields as many as stay, and one more. Drafts that do not stay leave entries in the caches, at positions
that are masked until the tokens that do come there overwrite them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tokenizers import Tokenizer

from dsv3_jax.data.tokenizer import special_tokens
from dsv3_jax.inference.penalties import History, penalized
from dsv3_jax.inference.placement import EVERYWHERE, ROWS, over
from dsv3_jax.inference.sampling import SamplingInputs, choose_tokens
from dsv3_jax.inference.speculation import Drafts, draft_token, verify
from dsv3_jax.model.cache import NOWHERE, Latents
from dsv3_jax.model.transformer import Cache, Transformer
from sharding.collectives import anywhere, joined, spread_like, summed
from sharding.mesh import ROW_AXES
from sharding.rules import TENSOR_AXES

LONGEST_CHUNK = 64
"""Tokens of a chunk at most, drafts aside."""


class Vocabulary(NamedTuple):
    """Which ids may come out of the model."""

    known_W: Array
    """bool: the tokenizer has this id. The other rows of the head are padding and are never chosen."""
    end: Array
    """int32, the token that ends a document."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, words: int) -> "Vocabulary":
        """Of a model whose head has `words` rows.

        Raises:
            DataError: the tokenizer has no token that ends a document.
        """
        known_W = np.zeros(words, bool)
        known_W[np.fromiter(tokenizer.get_vocab(with_added_tokens=True).values(), np.int32)] = True
        return cls(jnp.asarray(known_W), jnp.int32(special_tokens(tokenizer).end))


class Rows(NamedTuple):
    """The state of a batch between two tokens. A row whose token is the end token has ended."""

    cache: Cache
    tokens_B: Array
    """int32, the newest token of each row, not in the cache yet."""
    positions_B: Array
    """int32, its position."""
    draft_cache: Latents | None
    drafts: Drafts | None
    """Of the positions after it; both None without speculation."""
    history: History | None
    """What each row was told and has said, the newest token included; None where no row is penalized for it."""


class Made(NamedTuple):
    """What a chunk of decoding adds."""

    tokens_BC: Array
    """int32, the first `count_B` of each row."""
    count_B: Array
    accepted_k: Array
    """int32, how often each draft stayed, over rows and passes."""
    passes: Array
    """int32, passes of the model over rows that had not ended."""


@functools.cache
def compiled(structure: jax.tree_util.PyTreeDef, drafts: int, mesh: Mesh | None = None) -> tuple[Callable, Callable]:
    """`_prefill` and `_decode_chunk`, jitted, for models of one structure, which they take as leaves."""

    def prefill(leaves: list[Array], *arguments: Any) -> Rows:
        *arrays, cache_length = arguments

        def function(model: Transformer, *arrays: Any) -> Rows:
            return _prefill(model, drafts, *[*arrays, cache_length])

        each = ROWS, ROWS, ROWS, EVERYWHERE, ROWS
        return over(mesh, structure, function, each, ROWS)(leaves, *arrays)

    def decode_chunk(model: Transformer, *arrays: Any) -> tuple[Rows, Made]:
        return _decode_chunk(model, drafts, *arrays)

    each = ROWS, ROWS, EVERYWHERE, EVERYWHERE
    made = Made(ROWS, ROWS, EVERYWHERE, EVERYWHERE)
    decode = over(mesh, structure, decode_chunk, each, (ROWS, made))
    return jax.jit(prefill, static_argnums=6), jax.jit(decode, donate_argnums=1)


def _prefill(
    model: Transformer,
    drafts: int,
    tokens_BS: Array,
    lengths_B: Array,
    inputs: SamplingInputs,
    vocabulary: Vocabulary,
    history: History | None,
    cache_length: int,
) -> Rows:
    """The prompts' cache, the first new token of each, and drafts of those after it."""
    batch = tokens_BS.shape[0]
    hidden_BSD, cache, _ = model.prefill(tokens_BS, model.empty_cache(batch, cache_length))
    last_B11 = (lengths_B - 1)[:, None, None]
    logits_B1W = known_logits(model, model.norm(jnp.take_along_axis(hidden_BSD, last_B11, axis=1)), vocabulary)
    tokens_B = choose_tokens(penalized(logits_B1W[:, 0], inputs, history), inputs, lengths_B)
    rows = Rows(cache, tokens_B, lengths_B, None, None, with_tokens(history, tokens_B))
    if not drafts:
        return rows
    following_BS = jnp.roll(tokens_BS, -1, axis=1).at[jnp.arange(batch), lengths_B - 1].set(tokens_B)
    empty = model.empty_draft_cache(batch, cache_length)
    state_BSD, draft_cache = model.draft_prefill(model.drafting_state(hidden_BSD), following_BS, empty)
    state_B1D = jnp.take_along_axis(state_BSD, last_B11, axis=1)
    return with_drafts(model, rows, drafts, state_B1D, draft_cache, inputs, vocabulary)


def _decode_chunk(
    model: Transformer, drafts: int, rows: Rows, inputs: SamplingInputs, vocabulary: Vocabulary, steps: Array
) -> tuple[Rows, Made]:
    """At least `steps` more tokens a row, fewer where every row has ended; more where a row's drafts stay."""

    def goes_on(carry: tuple[Rows, Made]) -> Array:
        rows, made = carry
        return anywhere((made.count_B < steps) & (rows.tokens_B != vocabulary.end))

    def one_pass(carry: tuple[Rows, Made]) -> tuple[Rows, Made]:
        rows, made = carry
        going_B = rows.tokens_B != vocabulary.end
        new_Bn, accepted_B, _, _, rows = next_tokens(model, drafts, rows, inputs, vocabulary)
        # Up to the end token, if a draft is one.
        place_n = jnp.arange(drafts + 1)
        before_Bn = jnp.cumsum(new_Bn == vocabulary.end, axis=1) - (new_Bn == vocabulary.end)
        kept_Bn = going_B[:, None] & (place_n <= accepted_B[:, None]) & (before_Bn == 0)
        count_B = kept_Bn.sum(axis=1, dtype=jnp.int32)
        column_Bn = jnp.where(kept_Bn, made.count_B[:, None] + place_n, made.tokens_BC.shape[1])
        batch_B1 = jnp.arange(new_Bn.shape[0])[:, None]
        newest_B = jnp.take_along_axis(new_Bn, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
        made = Made(
            made.tokens_BC.at[batch_B1, column_Bn].set(new_Bn, mode="drop"),
            made.count_B + count_B,
            made.accepted_k + (going_B[:, None] & (place_n[1:] <= accepted_B[:, None])).sum(axis=0, dtype=jnp.int32),
            made.passes + going_B.sum(dtype=jnp.int32),
        )
        tokens_B = jnp.where(going_B, newest_B, vocabulary.end)
        return rows._replace(tokens_B=tokens_B, positions_B=rows.positions_B + count_B), made

    batch = rows.tokens_B.shape[0]
    empty = Made(
        jnp.zeros((batch, LONGEST_CHUNK * (drafts + 1)), jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(drafts, jnp.int32),
        jnp.int32(0),
    )
    empty = jax.tree.map(lambda part: spread_like(part, rows.tokens_B), empty)
    rows, made = jax.lax.while_loop(goes_on, one_pass, (rows, empty))
    return rows, made._replace(accepted_k=summed(made.accepted_k, ROW_AXES), passes=summed(made.passes, ROW_AXES))


def next_tokens(
    model: Transformer, drafts: int, rows: Rows, inputs: SamplingInputs, vocabulary: Vocabulary
) -> tuple[Array, Array, Array, Array, Rows]:
    """One pass of the model over the newest token and its drafts.

    Returns the next tokens, int32 [B, n], of which the drafts that stay and one more count; how many stay, int32 [B];
    the model's own logits for each, float32 [B, n, W]; the experts that made these, those of the position before each
    token, int32 [B, n, L, K]; and the rows with caches and drafts of what comes after, their newest token still the
    one before.
    """
    at_B1 = rows.positions_B[:, None]
    if rows.drafts is None or rows.draft_cache is None:
        hidden_B1D, cache, experts_B1LK = model.decode(rows.tokens_B[:, None], rows.cache, at_B1)
        logits_B1W = known_logits(model, model.norm(hidden_B1D), vocabulary)
        logits_BW = penalized(logits_B1W[:, 0], inputs, rows.history)
        next_B = choose_tokens(logits_BW, inputs, rows.positions_B + 1)
        rows = rows._replace(cache=cache, history=with_tokens(rows.history, next_B))
        return next_B[:, None], jnp.zeros_like(next_B), logits_B1W, experts_B1LK, rows
    positions_Bn = at_B1 + jnp.arange(drafts + 1)
    tokens_Bn = jnp.concatenate([rows.tokens_B[:, None], rows.drafts.tokens_Bk], axis=1)
    hidden_BnD, cache, experts_BnLK = model.decode(tokens_Bn, rows.cache, positions_Bn)
    own_BnW = logits_BnW = known_logits(model, model.norm(hidden_BnD), vocabulary)
    if rows.history is not None:
        # Each position has heard of the drafts before it.
        heard: list[History | None] = [rows.history]
        for place in range(drafts):
            heard.append(with_tokens(heard[-1], rows.drafts.tokens_Bk[:, place]))
        each = [penalized(logits_BnW[:, place], inputs, history) for place, history in enumerate(heard)]
        logits_BnW = jnp.stack(each, axis=1)
    accepted_B, next_B = verify(logits_BnW, rows.drafts, inputs, rows.positions_B + 1)
    accepted_B1 = accepted_B[:, None]
    # Drafts, then the model's own token in the place of the first that did not stay.
    new_Bn = jnp.pad(rows.drafts.tokens_Bk, ((0, 0), (0, 1)))
    new_Bn = jnp.where(jnp.arange(drafts + 1) == accepted_B1, next_B[:, None], new_Bn)
    # The MTP module sees what the model has made of the tokens that stay; the other entries are not written.
    stays_Bn = jnp.arange(drafts + 1) <= accepted_B1
    written_Bn = jnp.where(stays_Bn, positions_Bn, NOWHERE)
    state_BnD, draft_cache = model.draft(model.drafting_state(hidden_BnD), new_Bn, rows.draft_cache, written_Bn)
    state_B1D = jnp.take_along_axis(state_BnD, accepted_B1[..., None], axis=1)
    history = rows.history
    for place in range(drafts + 1):
        history = with_tokens(history, new_Bn[:, place], stays_Bn[:, place])
    after = Rows(cache, next_B, rows.positions_B + accepted_B + 1, None, None, history)
    after = with_drafts(model, after, drafts, state_B1D, draft_cache, inputs, vocabulary)
    after = after._replace(tokens_B=rows.tokens_B, positions_B=rows.positions_B)
    return new_Bn, accepted_B, own_BnW, experts_BnLK, after


def with_drafts(
    model: Transformer,
    rows: Rows,
    drafts: int,
    state_B1D: Array,
    draft_cache: Latents,
    inputs: SamplingInputs,
    vocabulary: Vocabulary,
) -> Rows:
    """The rows with drafts, from the MTP module's state at the position before each newest token."""
    tokens: list[Array] = []
    probabilities: list[Array] = []
    history = rows.history
    for place in range(drafts):
        position_B = rows.positions_B + place
        if place:
            state_B1D, draft_cache = model.draft(state_B1D, tokens[-1][:, None], draft_cache, position_B[:, None] - 1)
        logits_B1W = known_logits(model, state_B1D, vocabulary)
        logits_BW = penalized(logits_B1W[:, 0], inputs, history)
        token_B, probability_BW = draft_token(logits_BW, inputs, position_B + 1)
        history = with_tokens(history, token_B)
        tokens.append(token_B)
        probabilities.append(probability_BW)
    return rows._replace(
        draft_cache=draft_cache, drafts=Drafts(jnp.stack(tokens, axis=1), jnp.stack(probabilities, axis=1))
    )


def with_tokens(history: History | None, tokens_B: Array, counted_B: Array | None = None) -> History | None:
    """`History.with_tokens`, of every row unless told which, where there is a history."""
    if history is None:
        return None
    return history.with_tokens(tokens_B, jnp.ones(tokens_B.shape, bool) if counted_B is None else counted_B)


def known_logits(model: Transformer, normed_BSD: Array, vocabulary: Vocabulary) -> Array:
    """Logits of the ids that the tokenizer has; the others are -inf."""
    return jnp.where(vocabulary.known_W, joined(model.logits(normed_BSD), 2, TENSOR_AXES), -jnp.inf)
