"""Generation: prefill prompts into a latent cache, then decode against it, a chunk of tokens at a time on the device.

Shapes and compiled code. A call compiles `_prefill` and `_decode_chunk` once for its number of prompts and its two
bucketed lengths: of the prompts (`prompt_bucket`) and of the cache (`cache_bucket`). Sampling settings, the end token
and the number of tokens are array arguments and compile nothing.

Rows of different lengths are padded on the right. Padding comes after a row's last token, so causality keeps it from
the row; its cache entries lie after the row's position, so they are masked, and are overwritten one by one as the row
reaches them. A row's result is that of its prompt alone.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizer import special_tokens
from dsv3_jax.errors import UserError
from dsv3_jax.inference.sampling import Sampling, SamplingInputs, choose_tokens
from dsv3_jax.inference.weights import unstacked, with_inference_types
from dsv3_jax.model.transformer import Cache, Transformer

# Tokens a call: more and more of them, so that the call's own time is lost among theirs, as long as text still flows.
FIRST_CHUNK, LONGEST_CHUNK = 8, 64
FLOWING_SECONDS = 0.05


class GenerationError(UserError, ValueError):
    """Prompts that the model cannot continue."""

    exit_code = 2


class Chunk(NamedTuple):
    """What one round of generation adds."""

    token_ids: list[list[int]]
    """New tokens of each prompt, the end token included; none once its row has ended."""
    seconds: float
    """Time they took, compilation not counted; 0 for the first token, which is prefill's."""


class Vocabulary(NamedTuple):
    """Which ids may come out of the model."""

    known_W: Array
    """bool: the tokenizer has this id. The other rows of the head are padding and are never chosen."""
    end: Array
    """int32, the token that ends a document."""


class Rows(NamedTuple):
    """The state of a batch between two tokens. A row whose token is the end token has ended."""

    cache: Cache
    tokens_B: Array
    """int32, the newest token of each row, not in the cache yet."""
    positions_B: Array
    """int32, its position."""


class Generator:
    """Continues token ids with a model; `complete` in completion.py does the same for text."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        # Cast and unstacked once here, not at every token; as leaves, because flattening modules at every call is slow.
        model = unstacked(with_inference_types(_cast, model, model.model.precision))
        self._leaves, structure = jax.tree.flatten(model)
        self._prefill, self._decode_chunk = _compiled(structure)
        self._config = model.model
        ids = np.fromiter(tokenizer.get_vocab(with_added_tokens=True).values(), np.int32)
        known_W = np.zeros(self._config.vocabulary, bool)
        known_W[ids] = True
        self._end = special_tokens(tokenizer).end
        self._vocabulary = Vocabulary(jnp.asarray(known_W), jnp.int32(self._end))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int) -> Iterator[Chunk]:
        """Continue all prompts together, each until the end token or `max_new_tokens`.

        Yields:
            The first token of every prompt, then up to LONGEST_CHUNK more at a time.

        Raises:
            GenerationError: an empty prompt, one too long for the model, or a model whose logits are NaN.
        """
        longest = self._check(prompts, max_new_tokens)
        tokens_BS, lengths_B = _padded(prompts, prompt_bucket(longest, self._config))
        inputs = SamplingInputs.of([sampling] * len(prompts), range(len(prompts)))
        cache_length = cache_bucket(longest + max_new_tokens, self._config)
        rows = self._prefill(self._leaves, tokens_BS, lengths_B, inputs, self._vocabulary, cache_length)
        ended_B = np.zeros(len(prompts), bool)
        yield Chunk(self._new_ids(np.asarray(rows.tokens_B)[:, None], ended_B), 0.0)
        left = max_new_tokens - 1
        if left:
            # No steps: compiles the chunk, so that the first one's time is the model's.
            rows, _, _ = self._decode(rows, inputs, 0)
        steps = FIRST_CHUNK
        while left and not ended_B.all():
            start = time.perf_counter()
            rows, chunk_BC, count = self._decode(rows, inputs, min(left, steps))
            made_BC = np.asarray(chunk_BC)[:, : int(count)]
            seconds = time.perf_counter() - start
            yield Chunk(self._new_ids(made_BC, ended_B), seconds)
            left -= made_BC.shape[1]
            if 2 * seconds < FLOWING_SECONDS:
                steps = min(2 * steps, LONGEST_CHUNK)

    def _decode(self, rows: Rows, inputs: SamplingInputs, steps: int) -> tuple[Rows, Array, Array]:
        return self._decode_chunk(self._leaves, rows, inputs, self._vocabulary, np.int32(steps))

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not prompts or not all(prompts):
            raise GenerationError("there is nothing to continue: every prompt needs at least one token")
        longest, most = max(map(len, prompts)), self._config.maximum_positions
        if longest + max_new_tokens > most:
            raise GenerationError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} need {longest + max_new_tokens} "
                f"positions, and the model has model.maximum_positions={most}"
            )
        return longest

    def _new_ids(self, made_BC: np.ndarray, ended_B: np.ndarray) -> list[list[int]]:
        """The new tokens of each row up to its end token; marks in `ended_B` the rows that end."""
        if (made_BC >= self._config.vocabulary).any():
            raise GenerationError("the model's logits are NaN: its parameters are not finite")
        new_ids: list[list[int]] = []
        for row, ids in enumerate(made_BC.tolist()):
            if ended_B[row]:
                ids = []
            elif self._end in ids:
                ids = ids[: ids.index(self._end) + 1]
                ended_B[row] = True
            new_ids.append(ids)
        return new_ids


def prompt_bucket(tokens: int, config: ModelConfig) -> int:
    """Length prompts are padded to: a power of two, at least 16."""
    return _bucket(tokens, 16, config)


def cache_bucket(positions: int, config: ModelConfig) -> int:
    """Length of the cache: a power of two, at least 128, never shorter than the prompts' bucket."""
    return _bucket(positions, 128, config)


@functools.cache
def _compiled(structure: jax.tree_util.PyTreeDef) -> tuple[Callable, Callable]:
    """`_prefill` and `_decode_chunk`, jitted, for models of one structure, which they take as leaves."""

    def of_leaves(function: Callable) -> Callable:
        return lambda leaves, *arguments: function(jax.tree.unflatten(structure, leaves), *arguments)

    return jax.jit(of_leaves(_prefill), static_argnums=5), jax.jit(of_leaves(_decode_chunk), donate_argnums=1)


def _prefill(
    model: Transformer,
    tokens_BS: Array,
    lengths_B: Array,
    inputs: SamplingInputs,
    vocabulary: Vocabulary,
    cache_length: int,
) -> Rows:
    """The prompts' cache and the first new token of each."""
    cache = model.empty_cache(tokens_BS.shape[0], cache_length)
    hidden_BSD, cache = model.prefill(tokens_BS, cache)
    last_B1D = jnp.take_along_axis(hidden_BSD, (lengths_B - 1)[:, None, None], axis=1)
    tokens_B = _next_tokens(model, last_B1D, lengths_B, inputs, vocabulary)
    return Rows(cache, tokens_B, lengths_B)


def _decode_chunk(
    model: Transformer, rows: Rows, inputs: SamplingInputs, vocabulary: Vocabulary, steps: Array
) -> tuple[Rows, Array, Array]:
    """Up to `steps` more tokens a row, fewer where every row has ended.

    Returns the rows, the tokens int32 [B, LONGEST_CHUNK], and how many of them were made.
    """

    def goes_on(carry) -> Array:
        rows, _, count = carry
        return (count < steps) & (rows.tokens_B != vocabulary.end).any()

    def one_token(carry):
        rows, made_BC, count = carry
        hidden_B1D, cache = model.decode(rows.tokens_B[:, None], rows.cache, rows.positions_B[:, None])
        tokens_B = _next_tokens(model, hidden_B1D, rows.positions_B + 1, inputs, vocabulary)
        ended_B = rows.tokens_B == vocabulary.end
        tokens_B = jnp.where(ended_B, vocabulary.end, tokens_B)
        rows = Rows(cache, tokens_B, rows.positions_B + ~ended_B)
        return rows, made_BC.at[:, count].set(tokens_B), count + 1

    made_BC = jnp.zeros((rows.tokens_B.shape[0], LONGEST_CHUNK), jnp.int32)
    return jax.lax.while_loop(goes_on, one_token, (rows, made_BC, jnp.int32(0)))


def _next_tokens(
    model: Transformer, hidden_B1D: Array, positions_B: Array, inputs: SamplingInputs, vocabulary: Vocabulary
) -> Array:
    """The tokens at `positions_B`, from the residual stream of the position before."""
    logits_BW = model.logits(model.norm(hidden_B1D))[:, 0]
    return choose_tokens(jnp.where(vocabulary.known_W, logits_BW, -jnp.inf), inputs, positions_B)


def _padded(prompts: Sequence[Sequence[int]], length: int) -> tuple[Array, Array]:
    tokens_BS = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    return jnp.asarray(tokens_BS), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


def _bucket(length: int, least: int, config: ModelConfig) -> int:
    return min(max(least, 1 << (length - 1).bit_length()), config.maximum_positions)


def _cast(array: Array, dtype: jnp.dtype) -> Array:
    return array if array.dtype == dtype else array.astype(dtype)
