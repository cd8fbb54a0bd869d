"""From logits to a token: greedy, or drawn at a temperature from the most probable tokens (top-k, top-p)."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3_jax.errors import UserError

BITS_OF_ONE = 0x3F800000  # the float32 1.0 as an integer


class SamplingError(UserError, ValueError):
    """A setting out of its range. The message names it, its value and the range."""

    exit_code = 2


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The same settings and prompts give the same tokens."""

    temperature: float = 0.8
    """Divides the logits before the softmax; 0 always takes the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens only; 0: from all."""
    top_p: float = 0.95
    """Draw from the fewest most probable tokens whose probabilities, after top_k, reach this sum; 1: from all."""
    seed: int = 0
    """Seed of the draws; each prompt of a batch has a stream of its own."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise SamplingError(f"temperature={self.temperature} must be finite and at least 0; 0 is greedy")
        if self.top_k < 0:
            raise SamplingError(f"top_k={self.top_k} must be at least 0; 0 turns it off")
        if not 0.0 < self.top_p <= 1.0:
            raise SamplingError(f"top_p={self.top_p} must be above 0 and at most 1; 1 turns it off")
        if not 0 <= self.seed < 2**32:
            raise SamplingError(f"seed={self.seed} must be between 0 and {2**32 - 1}")


class SamplingInputs(NamedTuple):
    """`Sampling` as arrays: one compiled function serves every setting."""

    temperature: Array
    top_k: Array
    top_p: Array
    keys_B: Array
    """A random stream a row."""

    @classmethod
    def of(cls, sampling: Sampling, rows: int) -> "SamplingInputs":
        return cls(
            jnp.asarray(np.float32(sampling.temperature)),
            jnp.asarray(np.int32(sampling.top_k)),
            jnp.asarray(np.float32(sampling.top_p)),
            _streams(np.uint32(sampling.seed), rows),
        )


# Compiled: one operation after another takes longer than two tokens of a small model.
@functools.partial(jax.jit, static_argnums=1)
def _streams(seed: Array, rows: int) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(rows))


def choose_tokens(logits_BW: Array, inputs: SamplingInputs, positions_B: Array) -> Array:
    """One token a row, int32 [B], for the given positions; W where a row's logits hold a NaN.

    A draw depends on the logits, the settings, the row's stream and the position, on nothing else in the batch. An id
    whose logit is -inf is never chosen.
    """

    def draw(logits_BW: Array) -> Array:
        return drawn_from(probabilities(logits_BW, inputs), uniforms(inputs, positions_B, 0))

    return jax.lax.cond(inputs.temperature > 0, draw, most_probable, logits_BW)


def probabilities(logits_BW: Array, inputs: SamplingInputs) -> Array:
    """What a token is drawn from at a temperature above 0: float32 [B, W], 0 for what top-k and top-p leave out."""
    # The largest logit goes first: dividing it by a tiny temperature would overflow.
    shifted_BW = logits_BW - logits_BW.max(axis=-1, keepdims=True)
    probability_BW = jax.nn.softmax(shifted_BW / inputs.temperature, axis=-1)

    def among_top_k(probability_BW: Array) -> Array:
        return _normalized(probability_BW, smallest_set(probability_BW, jnp.ones_like(probability_BW), inputs.top_k))

    def among_top_p(probability_BW: Array) -> Array:
        return _normalized(probability_BW, smallest_set(probability_BW, probability_BW, inputs.top_p))

    probability_BW = jax.lax.cond(inputs.top_k > 0, among_top_k, lambda same: same, probability_BW)
    return jax.lax.cond(inputs.top_p < 1, among_top_p, lambda same: same, probability_BW)


def smallest_set(probability_BW: Array, weight_BW: Array, target: Array) -> Array:
    """The fewest most probable ids of each row whose weights sum to at least `target`, bool [B, W].

    Of equally probable ids the lower counts as the more probable. All ids where the sum of all does not reach the
    target. `target` is above 0.

    The threshold is found by bisection on the bits of a float32, which for numbers from 0 order as the numbers do: 30
    passes over the row, where a sort costs as much as a small model's whole forward pass.
    """

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        reaching_B, failing_B = bounds
        middle_B = (reaching_B + failing_B) // 2
        above_BW = probability_BW >= jax.lax.bitcast_convert_type(middle_B, jnp.float32)[:, None]
        reaches_B = jnp.sum(jnp.where(above_BW, weight_BW, 0), axis=-1) >= target
        return jnp.where(reaches_B, middle_B, reaching_B), jnp.where(reaches_B, failing_B, middle_B)

    rows = probability_BW.shape[0]
    bounds = jnp.zeros(rows, jnp.int32), jnp.full(rows, BITS_OF_ONE + 1, jnp.int32)
    reaching_B, _ = jax.lax.fori_loop(0, BITS_OF_ONE.bit_length(), halve, bounds)
    threshold_B1 = jax.lax.bitcast_convert_type(reaching_B, jnp.float32)[:, None]
    above_BW, equal_BW = probability_BW > threshold_B1, probability_BW == threshold_B1
    above_B1 = jnp.sum(jnp.where(above_BW, weight_BW, 0), axis=-1, keepdims=True)
    weight_of_equal_BW = jnp.where(equal_BW, weight_BW, 0)
    before_BW = above_B1 + jnp.cumsum(weight_of_equal_BW, axis=-1) - weight_of_equal_BW
    return above_BW | (equal_BW & (before_BW < target))


def most_probable(logits_BW: Array) -> Array:
    """The lowest of the ids with the largest logit, int32; W where a logit is NaN. Over any leading dims."""
    return _lowest(logits_BW == logits_BW.max(axis=-1, keepdims=True))


def uniforms(inputs: SamplingInputs, positions_B: Array, purpose: int) -> Array:
    """A number in [0, 1) a row, float32, that depends on the row's stream, the position and the purpose alone."""

    def one(key: Array, position: Array) -> Array:
        key = jax.random.fold_in(key, position)
        return jax.random.uniform(jax.random.fold_in(key, purpose) if purpose else key)

    return jax.vmap(one)(inputs.keys_B, positions_B)


def drawn_from(probability_BW: Array, uniform_B: Array) -> Array:
    """Inversion: the first id at which the running sum of probabilities passes a uniform share of the whole sum."""
    possible_BW = probability_BW > 0
    # A parallel running sum need not rise strictly or evenly: only possible ids count, and the whole is their largest.
    sum_BW = jnp.where(possible_BW, jnp.cumsum(probability_BW, axis=-1), 0)
    return _lowest(possible_BW & (sum_BW > uniform_B[:, None] * sum_BW.max(axis=-1, keepdims=True)))


def _lowest(marked_BW: Array) -> Array:
    # XLA:CPU takes argmax one element at a time, ten times slower than this.
    width = marked_BW.shape[-1]
    return jnp.min(jnp.where(marked_BW, jnp.arange(width, dtype=jnp.int32), width), axis=-1)


def _normalized(probability_BW: Array, kept_BW: Array) -> Array:
    kept_probability_BW = jnp.where(kept_BW, probability_BW, 0)
    return kept_probability_BW / kept_probability_BW.sum(axis=-1, keepdims=True)
