"""Penalties for repeating: what a row's prompt and output hold, and what that does to its next logits."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3_jax.inference.sampling import SamplingInputs


class History(NamedTuple):
    """What each row has said and been told."""

    prompt_BW: Array
    """bool: the id is in the row's prompt."""
    generated_BW: Array
    """int32: how often the id is in the row's output."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], vocabulary: int) -> "History":
        """Prompts with no output yet."""
        prompt_BW = np.zeros((len(prompts), vocabulary), bool)
        for row, prompt in enumerate(prompts):
            prompt_BW[row, list(prompt)] = True
        return cls(jnp.asarray(prompt_BW), jnp.zeros(prompt_BW.shape, jnp.int32))

    def with_tokens(self, tokens_B: Array, counted_B: Array) -> "History":
        """One more token of output in each row where `counted_B` (bool) holds; an id of W or more counts nowhere."""
        rows_B = jnp.arange(tokens_B.shape[0])
        counts = counted_B.astype(jnp.int32)
        return self._replace(generated_BW=self.generated_BW.at[rows_B, tokens_B].add(counts, mode="drop"))


def penalized(logits_BW: Array, inputs: SamplingInputs, history: History | None) -> Array:
    """The logits after each row's repetition, then frequency and presence penalties; float32 [B, W].

    Repetition as in transformers (prompt and output), the others as in OpenAI's API (output). A row without penalties
    keeps its logits bit for bit. Without a history (no row of the batch has penalties) there is nothing to compute.
    """
    if history is None:
        return logits_BW
    penalizes = (
        (inputs.repetition_penalty_B != 1) | (inputs.presence_penalty_B != 0) | (inputs.frequency_penalty_B != 0)
    )
    return jax.lax.cond(penalizes.any(), _penalized, lambda same, *_: same, logits_BW, inputs, history)


def _penalized(logits_BW: Array, inputs: SamplingInputs, history: History) -> Array:
    generated_BW = history.generated_BW > 0
    repetition_B1 = inputs.repetition_penalty_B[:, None]
    repeated_BW = jnp.where(logits_BW > 0, logits_BW / repetition_B1, logits_BW * repetition_B1)
    logits_BW = jnp.where(history.prompt_BW | generated_BW, repeated_BW, logits_BW)
    logits_BW -= inputs.frequency_penalty_B[:, None] * history.generated_BW
    return logits_BW - jnp.where(generated_BW, inputs.presence_penalty_B[:, None], 0)
