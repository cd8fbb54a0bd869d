"""Generation: prefill prompts into a latent cache, then decode against it, a chunk of tokens at a time on the device.

Shapes and compiled code. A call compiles prefill and decoding (decoding.py) once for its number of prompts and its two
bucketed lengths: of the prompts (`prompt_bucket`) and of the cache (`cache_bucket`); of prompts that go into the cache
in pieces, for the cache's length alone. Sampling settings, the end token and the number of tokens are array arguments
and compile nothing.

Rows of different lengths are padded on the right. Padding comes after a row's last token, so causality keeps it from
the row; its cache entries lie after the row's position, so they are masked, and are overwritten one by one as the row
reaches them. A row's result is that of its prompt alone.
"""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

from dsv3_jax.errors import UserError
from dsv3_jax.inference.decoding import LONGEST_CHUNK, Made, Rows, Vocabulary, compiled
from dsv3_jax.inference.penalties import History
from dsv3_jax.inference.placement import mesh_of, row_parts
from dsv3_jax.inference.prefilling import compiled_pieces, prefill_by_pieces
from dsv3_jax.inference.sampling import Sampling, SamplingInputs
from dsv3_jax.inference.weights import ready_to_decode
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig

# Tokens a call: more and more of them, so that the call's own time is lost among theirs, as long as text still flows.
FIRST_CHUNK = 8
# Whole rows are the faster form and take memory with their length squared; a piece of this many tokens is long enough
# for fast products, and for experts with rows enough.
PREFILL_CHUNK = 2048
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
    passes: int
    """Passes of the model over each row that had not ended, summed over the rows."""
    accepted: list[int]
    """Of drafts 1, 2, ..., how many stayed."""


class Generator:
    """Continues token ids with a model; `complete` in completion.py does the same for text."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, drafts: int = 0, prefill_chunk: int = PREFILL_CHUNK):
        """Args:
            drafts: tokens that the MTP module guesses ahead and the model verifies in one pass; 0: none.
            prefill_chunk: longer prompts go into the cache in pieces of so many tokens (prefilling.py).

        Raises:
            GenerationError: drafts of a model without MTP module, or a number too small.
        """
        if drafts < 0 or (drafts and not model.model.mtp_depth):
            raise GenerationError(
                f"speculative={drafts} must be at least 0, and 0 for a model without MTP module "
                f"(model.mtp_depth={model.model.mtp_depth})"
            )
        if prefill_chunk < 1:
            raise GenerationError(f"prefill_chunk={prefill_chunk} must be at least 1")
        # As leaves, because flattening modules at every call is slow.
        self._leaves, structure = jax.tree.flatten(ready_to_decode(model))
        mesh = mesh_of(model)
        self._prefill, self._decode_chunk = compiled(structure, drafts, mesh)
        self._pieces = compiled_pieces(structure, drafts, mesh)
        self._parts = row_parts(model)
        self._config, self._drafts, self.prefill_chunk = model.model, drafts, prefill_chunk
        self._vocabulary = Vocabulary.of(tokenizer, self._config.vocabulary)
        self._end = int(self._vocabulary.end)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int) -> Iterator[Chunk]:
        """Continue all prompts together, each until the end token or `max_new_tokens`.

        Yields:
            The first token of every prompt, then more of them at a time.

        Raises:
            GenerationError: an empty prompt, one too long for the model, or a model whose logits are NaN.
        """
        longest, count = self._check(prompts, max_new_tokens), len(prompts)
        # As many rows on every device: those added have ended before they begin.
        prompts = [*prompts, *[[self._end]] * (-count % self._parts)]
        inputs = SamplingInputs.of([sampling] * len(prompts), range(len(prompts)))
        cache_length = cache_bucket(longest + max_new_tokens, self._config)
        history = History.of(prompts, self._config.vocabulary) if sampling.penalizes else None
        rows = self._prefilled(prompts, longest, cache_length, inputs, history)
        if len(prompts) > count:
            rows = rows._replace(tokens_B=rows.tokens_B.at[count:].set(self._end))
        ended_B = np.zeros(count, bool)
        first_B = [[token] for token in np.asarray(rows.tokens_B)[:count].tolist()]
        yield Chunk(self._new_ids(first_B, ended_B), 0.0, count, [0] * self._drafts)
        left_B = np.full(count, max_new_tokens - 1)
        if left_B.any():
            # No steps: compiles the chunk, so that the first one's time is the model's.
            rows, _ = self._decode(rows, inputs, 0)
        steps = FIRST_CHUNK
        while (left_B[~ended_B] > 0).any():
            start = time.perf_counter()
            rows, made = self._decode(rows, inputs, min(int(left_B[~ended_B].max()), steps))
            made_BC, counts = np.asarray(made.tokens_BC), np.asarray(made.count_B)[:count].tolist()
            seconds = time.perf_counter() - start
            # Drafts may go beyond what was asked for.
            wanted = [made_BC[row, : min(new, left_B[row])].tolist() for row, new in enumerate(counts)]
            left_B = np.maximum(left_B - counts, 0)
            new_ids = self._new_ids(wanted, ended_B)
            yield Chunk(new_ids, seconds, int(made.passes), np.asarray(made.accepted_k).tolist())
            if 2 * seconds < FLOWING_SECONDS:
                steps = min(2 * steps, LONGEST_CHUNK)

    def _prefilled(
        self,
        prompts: Sequence[Sequence[int]],
        longest: int,
        cache_length: int,
        inputs: SamplingInputs,
        history: History | None,
    ) -> Rows:
        if longest > self.prefill_chunk:
            piece, words = self.prefill_chunk, self._vocabulary
            return prefill_by_pieces(self._leaves, self._pieces, prompts, piece, cache_length, inputs, words, history)
        tokens_BS, lengths_B = _padded(prompts, prompt_bucket(longest, self._config))
        return self._prefill(self._leaves, tokens_BS, lengths_B, inputs, self._vocabulary, history, cache_length)

    def _decode(self, rows: Rows, inputs: SamplingInputs, steps: int) -> tuple[Rows, Made]:
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

    def _new_ids(self, made: list[list[int]], ended_B: np.ndarray) -> list[list[int]]:
        """The new tokens of each row up to its end token; marks in `ended_B` the rows that end."""
        new_ids: list[list[int]] = []
        for row, ids in enumerate(made):
            if max(ids, default=0) >= self._config.vocabulary:
                raise GenerationError("the model's logits are NaN: its parameters are not finite")
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


def _padded(prompts: Sequence[Sequence[int]], length: int) -> tuple[Array, Array]:
    tokens_BS = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    return jnp.asarray(tokens_BS), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


def _bucket(length: int, least: int, config: ModelConfig) -> int:
    return min(max(least, 1 << (length - 1).bit_length()), config.maximum_positions)
