"""Long prompts into the cache: a piece of each at a time, so that temporaries are those of one piece.

A piece is decoded like any new tokens, against all that went before it. Its shape is that of every other piece of a
call; how far the rows are is a value.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from dsv3_jax.inference.decoding import Rows, Vocabulary, known_logits, with_drafts, with_tokens
from dsv3_jax.inference.penalties import History, penalized
from dsv3_jax.inference.placement import EVERYWHERE, ROWS, over
from dsv3_jax.inference.sampling import SamplingInputs, choose_tokens
from dsv3_jax.model.cache import NOWHERE, Latents
from dsv3_jax.model.transformer import Cache, Transformer
from sharding.mesh import row_shards


class Prompted(NamedTuple):
    """The caches after some pieces, and of each row the residual stream at its prompt's last token, once it was met."""

    cache: Cache
    draft_cache: Latents | None
    last_B1D: Array


def prefill_by_pieces(
    leaves: list[Array],
    compiled: tuple[Callable, Callable, Callable],
    prompts: Sequence[Sequence[int]],
    piece: int,
    cache_length: int,
    inputs: SamplingInputs,
    vocabulary: Vocabulary,
    history: History | None,
) -> Rows:
    """What decoding.py's prefill returns of the same prompts; `compiled` is of `compiled_pieces`."""
    empty, add, finish = compiled
    prompted = empty(leaves, len(prompts), cache_length)
    lengths_B = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    for start in range(0, max(map(len, prompts)), piece):
        tokens_Bs = np.zeros((len(prompts), piece + 1), np.int32)  # and the token that follows
        for row, prompt in zip(tokens_Bs, prompts, strict=True):
            of_row = prompt[start : start + piece + 1]
            row[: len(of_row)] = of_row
        prompted = add(leaves, prompted, jnp.asarray(tokens_Bs), lengths_B, jnp.int32(start))
        # Otherwise all pieces are handed over at once, and no signal is heard until the last is done.
        prompted.last_B1D.block_until_ready()
    *caches, last_B1D = prompted
    return finish(leaves, caches, last_B1D, lengths_B, inputs, vocabulary, history)


@functools.cache
def compiled_pieces(
    structure: jax.tree_util.PyTreeDef, drafts: int, mesh: Mesh | None = None
) -> tuple[Callable, Callable, Callable]:
    """`_empty`, `_add_piece` and `_finish`, jitted, for models of one structure, which they take as leaves."""
    parts = row_shards(mesh) if mesh else 1

    def compute(function: Callable, *arguments: str) -> Callable:
        return over(mesh, structure, lambda model, *arrays: function(model, drafts, *arrays), arguments, ROWS)

    def empty(leaves: list[Array], batch: int, cache_length: int) -> Prompted:
        return compute(lambda model, drafts: _empty(model, drafts, batch // parts, cache_length))(leaves)

    return (
        jax.jit(empty, static_argnums=(1, 2)),
        jax.jit(compute(_add_piece, ROWS, ROWS, ROWS, EVERYWHERE), donate_argnums=1),
        jax.jit(compute(_finish, ROWS, ROWS, ROWS, ROWS, EVERYWHERE, ROWS), donate_argnums=1),
    )


def _empty(model: Transformer, drafts: int, batch: int, cache_length: int) -> Prompted:
    last_B1D = jnp.zeros((batch, 1, model.model.width), jnp.dtype(model.model.dtype))
    draft_cache = model.empty_draft_cache(batch, cache_length) if drafts else None
    return Prompted(model.empty_cache(batch, cache_length), draft_cache, last_B1D)


def _add_piece(
    model: Transformer, drafts: int, prompted: Prompted, tokens_Bs: Array, lengths_B: Array, start: Array
) -> Prompted:
    """`tokens_Bs`: S tokens of each row from position `start` on, and one more; after a row's end anything."""
    place_1S = start + jnp.arange(tokens_Bs.shape[1] - 1)[None]
    positions_BS = jnp.where(place_1S < lengths_B[:, None], place_1S, NOWHERE)
    hidden_BSD, cache, _ = model.decode(tokens_Bs[:, :-1], prompted.cache, positions_BS)
    last_B11 = (lengths_B - 1 - start)[:, None, None]
    found_B1D = jnp.take_along_axis(hidden_BSD, last_B11, axis=1, mode="clip")
    ends_here_B11 = (last_B11 >= 0) & (last_B11 < place_1S.shape[1])
    last_B1D = jnp.where(ends_here_B11, found_B1D, prompted.last_B1D)
    draft_cache = prompted.draft_cache
    if draft_cache is not None:
        # What follows a prompt is not known yet: the entry of its last token is written again by `_finish`.
        _, draft_cache = model.draft(model.drafting_state(hidden_BSD), tokens_Bs[:, 1:], draft_cache, positions_BS)
    return Prompted(cache, draft_cache, last_B1D)


def _finish(
    model: Transformer,
    drafts: int,
    caches: tuple[Cache, Latents | None],
    last_B1D: Array,
    lengths_B: Array,
    inputs: SamplingInputs,
    vocabulary: Vocabulary,
    history: History | None,
) -> Rows:
    """The first new token of each prompt, and drafts of those after it."""
    cache, draft_cache = caches
    logits_B1W = known_logits(model, model.norm(last_B1D), vocabulary)
    tokens_B = choose_tokens(penalized(logits_B1W[:, 0], inputs, history), inputs, lengths_B)
    rows = Rows(cache, tokens_B, lengths_B, None, None, with_tokens(history, tokens_B))
    if draft_cache is None:
        return rows
    state_B1D, draft_cache = model.draft(
        model.drafting_state(last_B1D), tokens_B[:, None], draft_cache, (lengths_B - 1)[:, None]
    )
    return with_drafts(model, rows, drafts, state_B1D, draft_cache, inputs, vocabulary)
