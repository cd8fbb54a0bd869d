"""Log probabilities of a prompt's own tokens, which its echo reports: the model's plain forward pass."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tokenizers import Tokenizer

from dsv3_jax.inference.generation import prompt_bucket
from dsv3_jax.inference.placement import EVERYWHERE, ROWS, mesh_of, over
from dsv3_jax.inference.sampling import log_probabilities
from dsv3_jax.inference.server.token_texts import Scored
from dsv3_jax.model.transformer import Transformer
from sharding.collectives import joined
from sharding.mesh import row_shards
from sharding.rules import TENSOR_AXES

POSITIONS_AT_ONCE = 256
"""Logits of a whole long prompt would not fit."""
MOST_TOP = (1, 5, 20)
"""Each is compiled once for each bucket of lengths."""


class Scorer:
    """Called with token ids and a number of alternatives: every token but the first, which follows nothing.

    Among the tokens of the tokenizer, as in generation: other rows of the head are padding.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self._config = model.model
        known_W = np.zeros(self._config.vocabulary, bool)
        known_W[[*tokenizer.get_vocab(with_added_tokens=True).values()]] = True
        self._known_W = jnp.asarray(known_W)
        # As leaves, because flattening modules at every call is slow.
        self._leaves, structure = jax.tree.flatten(model)
        self._scores = jax.jit(partial(_scores, structure, mesh_of(model)), static_argnames="top")

    def __call__(self, token_ids: Sequence[int], top: int) -> list[Scored]:
        """At most `model.maximum_positions` tokens, and 20 alternatives to each."""
        bucket = prompt_bucket(len(token_ids), self._config)
        tokens_S = np.zeros(bucket, np.int32)
        tokens_S[: len(token_ids)] = token_ids
        compiled_top = next(most for most in MOST_TOP if top <= most)
        scores = self._scores(self._leaves, jnp.asarray(tokens_S), self._known_W, top=compiled_top)
        chosen_S, ids_SK, logprobs_SK = (np.asarray(part)[: len(token_ids) - 1].tolist() for part in scores)
        return [
            Scored(token, chosen, list(zip(ids_K[:top], logprobs_K[:top], strict=True)))
            for token, chosen, ids_K, logprobs_K in zip(token_ids[1:], chosen_S, ids_SK, logprobs_SK, strict=True)
        ]


def _scores(
    structure: jax.tree_util.PyTreeDef,
    mesh: Mesh | None,
    leaves: list[Array],
    tokens_S: Array,
    known_W: Array,
    top: int,
) -> tuple[Array, ...]:
    """For each position what `log_probabilities` says about the next token: [S], [S, K], [S, K].

    Padding on the right changes nothing before it: attention is causal, and no token is dropped for another.
    """

    def scores(model: Transformer, tokens_BS: Array, known_W: Array) -> tuple[Array, ...]:
        return tuple(part[None] for part in _scores_of_row(model, tokens_BS, known_W, top))

    # A row on every device that takes rows, the same: there is one prompt, and the experts are on all of them.
    tokens_BS = jnp.tile(tokens_S, (row_shards(mesh) if mesh else 1, 1))
    of_rows = over(mesh, structure, scores, (ROWS, EVERYWHERE), ROWS)(leaves, tokens_BS, known_W)
    return tuple(part[0] for part in of_rows)


def _scores_of_row(model: Transformer, tokens_1S: Array, known_W: Array, top: int) -> tuple[Array, ...]:
    hidden_1SD, _ = model.hidden_states(tokens_1S)
    length, width = hidden_1SD.shape[1:]
    chunk = math.gcd(length, POSITIONS_AT_ONCE)

    def of_chunk(part: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden_CD, following_C = part
        logits_CW = joined(model.logits(model.norm(hidden_CD[None]))[0], 1, TENSOR_AXES)
        return log_probabilities(jnp.where(known_W, logits_CW, -jnp.inf), following_C, top)

    chunks = hidden_1SD.reshape(-1, chunk, width), jnp.roll(tokens_1S, -1).reshape(-1, chunk)
    return tuple(part.reshape(length, *part.shape[2:]) for part in jax.lax.map(of_chunk, chunks))
