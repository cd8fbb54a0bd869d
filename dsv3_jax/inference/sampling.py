"""From logits to a token: greedy, or drawn at a temperature from the most probable tokens (top-k, top-p, min-p)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3_jax.errors import UserError

BITS_OF_ONE = 0x3F800000  # the float32 1.0 as an integer
LEAST_NORMAL = float(np.finfo(np.float32).tiny)  # devices may take less as 0
CHOICE = 0  # the purpose of choose_tokens' uniform numbers


class SamplingError(UserError, ValueError):
    """A setting out of its range. The message names it, its value and the range."""

    exit_code = 2


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The same settings and prompts give the same tokens.

    The order: penalties change the logits, the temperature divides them, then top_k, top_p and min_p each leave out
    what it does not keep of what the one before left, and the rest is scaled to a sum of 1.
    """

    temperature: float = 0.8
    """Divides the logits before the softmax; 0 always takes the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens only; 0: from all."""
    top_p: float = 0.95
    """Draw from the fewest most probable tokens whose probabilities, after top_k, reach this sum; 1: from all."""
    seed: int = 0
    """Seed of the draws; each prompt of a batch has a stream of its own."""
    min_p: float = 0.0
    """Draw from the tokens at least this share as probable as the most probable one; 0: from all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the output are divided by it if positive, multiplied if negative; 1: off."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the output; 0: off."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens in the output, once for each time they came; 0: off."""

    @property
    def penalizes(self) -> bool:
        """Whether the next logits depend on the tokens before beyond what the model makes of them."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise SamplingError(f"temperature={self.temperature} must be finite and at least 0; 0 is greedy")
        if self.top_k < 0:
            raise SamplingError(f"top_k={self.top_k} must be at least 0; 0 turns it off")
        if not 0.0 < self.top_p <= 1.0:
            raise SamplingError(f"top_p={self.top_p} must be above 0 and at most 1; 1 turns it off")
        if not 0 <= self.seed < 2**32:
            raise SamplingError(f"seed={self.seed} must be between 0 and {2**32 - 1}")
        if not 0.0 <= self.min_p <= 1.0:
            raise SamplingError(f"min_p={self.min_p} must be between 0 and 1; 0 turns it off")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise SamplingError(
                f"repetition_penalty={self.repetition_penalty} must be finite and above 0; 1 turns it off"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise SamplingError(f"{name}={getattr(self, name)} must be between -2 and 2; 0 turns it off")


class SamplingInputs(NamedTuple):
    """One `Sampling` a row as arrays [B]: one compiled function serves every setting, and rows may differ in all.

    Named as in `Sampling`; top_k is int32, streams are random keys, the others float32.
    """

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    repetition_penalty_B: Array
    presence_penalty_B: Array
    frequency_penalty_B: Array
    streams_B: Array

    @classmethod
    def of(cls, samplings: Sequence[Sampling], sample_indices: Sequence[int] | None = None) -> "SamplingInputs":
        """The settings of each row.

        A row's random stream comes from its seed and its sample index (0 where none are given) and from nothing else.
        Rows that continue one prompt with one seed need different indices to differ.
        """

        def column(name: str, dtype: type, least: float = -math.inf, most: float = math.inf) -> np.ndarray:
            values: np.ndarray = np.array(
                [min(max(getattr(sampling, name), least), most) for sampling in samplings], dtype
            )
            return np.where(np.abs(values) < LEAST_NORMAL, 0, values).astype(dtype)

        indices_B = np.zeros(len(samplings)) if sample_indices is None else np.array(sample_indices)
        return _inputs(
            np.array([sampling.seed for sampling in samplings], np.uint32),
            indices_B.astype(np.uint32),
            column("temperature", np.float32, most=1e30),
            column("top_k", np.int32, most=2**31 - 1),
            column("top_p", np.float32, least=LEAST_NORMAL),
            column("min_p", np.float32),
            # Beyond these it has long been as if never or always, and a finite logit has to stay finite.
            column("repetition_penalty", np.float32, least=1e-6, most=1e6),
            column("presence_penalty", np.float32),
            column("frequency_penalty", np.float32),
        )


# Compiled: one operation after another takes longer than two tokens of a small model.
@jax.jit
def _inputs(seeds_B: Array, indices_B: Array, *columns: Array) -> SamplingInputs:
    streams_B = jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(seeds_B, indices_B)
    return SamplingInputs._make([*columns, streams_B])


def choose_tokens(logits_BW: Array, inputs: SamplingInputs, positions_B: Array) -> Array:
    """One token a row, int32 [B], for the given positions; W where a row's logits hold a NaN or allow no id.

    A draw depends on the row's logits, settings, stream and position, not on its neighbours or its place (nor on how
    many there are, but that a backend may round the sum of a very wide row otherwise for another number of rows). An
    id whose logit is -inf is never chosen. `penalized` (penalties.py) comes before.
    """

    def drawn() -> Array:
        return draw(probabilities(logits_BW, inputs), uniforms(inputs, positions_B, CHOICE))

    return jax.lax.cond((inputs.temperature_B > 0).any(), drawn, lambda: most_probable(logits_BW))


def probabilities(logits_BW: Array, inputs: SamplingInputs) -> Array:
    """What a row's token is drawn from: float32 [B, W], 0 for what top-k, top-p and then min-p leave out.

    In a row of temperature 0, exactly 1 at the most probable id, of equals at the lowest, and 0 elsewhere. A row whose
    logits hold a NaN or allow no id has no number above 0.
    """
    greedy_B = inputs.temperature_B == 0
    # The largest logit goes first: dividing it by a tiny temperature would overflow.
    shifted_BW = logits_BW - logits_BW.max(axis=-1, keepdims=True)
    divided_BW = shifted_BW / jnp.where(greedy_B, 1, inputs.temperature_B)[:, None]
    best_B = jax.lax.cond(greedy_B.any(), lambda: most_probable(logits_BW), lambda: jnp.zeros_like(greedy_B, jnp.int32))
    elsewhere_BW = greedy_B[:, None] & (jnp.arange(logits_BW.shape[-1]) != best_B[:, None])
    probability_BW = jax.nn.softmax(jnp.where(elsewhere_BW, -jnp.inf, divided_BW), axis=-1)

    def among_top_k(probability_BW: Array) -> Array:
        return smallest_set(probability_BW, jnp.ones_like(probability_BW), inputs.top_k_B)

    def among_top_p(probability_BW: Array) -> Array:
        return smallest_set(probability_BW, probability_BW, inputs.top_p_B)

    def among_min_p(probability_BW: Array) -> Array:
        return probability_BW >= inputs.min_p_B[:, None] * probability_BW.max(axis=-1, keepdims=True)

    probability_BW = _restricted(probability_BW, inputs.top_k_B > 0, among_top_k)
    probability_BW = _restricted(probability_BW, inputs.top_p_B < 1, among_top_p)
    return _restricted(probability_BW, inputs.min_p_B > 0, among_min_p)


def draw(probability_BW: Array, uniform_B: Array) -> Array:
    """By inversion: the first id at which the running sum of probabilities passes a uniform share of the whole sum.

    int32 [B], W in a row without a number above 0. The probabilities of a row need not sum to 1.
    """
    possible_BW = probability_BW > 0
    # A parallel running sum need not rise strictly or evenly: only possible ids count, and the whole is their largest.
    sum_BW = jnp.where(possible_BW, jnp.cumsum(probability_BW, axis=-1), 0)
    return _lowest(possible_BW & (sum_BW > uniform_B[:, None] * sum_BW.max(axis=-1, keepdims=True)))


def uniforms(inputs: SamplingInputs, positions_B: Array, purpose: int) -> Array:
    """A number a row, float32 [B] in [0, 1): of the row's stream, the position and the purpose alone.

    Purposes (from 0, known when compiling) are independent of each other; `choose_tokens` draws for CHOICE.
    """

    def uniform(stream: Array, position: Array) -> Array:
        key = jax.random.fold_in(stream, position)
        return jax.random.uniform(jax.random.fold_in(key, purpose) if purpose else key)

    return jax.vmap(uniform)(inputs.streams_B, positions_B)


def log_probabilities(logits_BW: Array, tokens_B: Array, top: int) -> tuple[Array, Array, Array]:
    """Natural logarithms of the softmax of the model's own logits, before penalties and temperature.

    Returns those of `tokens_B`, float32 [B]; the `top` most probable ids, int32 [B, K], of equals the lower first; and
    theirs, float32 [B, K]. K is the smaller of `top` (known when compiling, may be 0) and W.
    """
    logits_BW = logits_BW.astype(jnp.float32)
    whole_B1 = jax.nn.logsumexp(logits_BW, axis=-1, keepdims=True)
    chosen_B1 = jnp.take_along_axis(logits_BW, tokens_B[:, None], axis=-1) - whole_B1
    logits_BK, ids_BK = jax.lax.top_k(logits_BW, min(top, logits_BW.shape[-1]))
    return chosen_B1[:, 0], ids_BK, logits_BK - whole_B1


def smallest_set(probability_BW: Array, weight_BW: Array, target_B: Array) -> Array:
    """The fewest most probable ids of each row whose weights sum to at least its target, bool [B, W].

    Of equally probable ids the lower counts as the more probable. All ids where the sum of all does not reach the
    target. A target of 0 or less gives no meaningful set.

    The threshold is found by bisection on the bits of a float32, which for numbers from 0 order as the numbers do: 30
    passes over the row, where a sort costs as much as a small model's whole forward pass.
    """

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        reaching_B, failing_B = bounds
        middle_B = (reaching_B + failing_B) // 2
        above_BW = probability_BW >= jax.lax.bitcast_convert_type(middle_B, jnp.float32)[:, None]
        reaches_B = jnp.sum(jnp.where(above_BW, weight_BW, 0), axis=-1) >= target_B
        return jnp.where(reaches_B, middle_B, reaching_B), jnp.where(reaches_B, failing_B, middle_B)

    bounds = jnp.zeros_like(target_B, jnp.int32), jnp.full_like(target_B, BITS_OF_ONE + 1, jnp.int32)
    reaching_B, _ = jax.lax.fori_loop(0, BITS_OF_ONE.bit_length(), halve, bounds)
    threshold_B1 = jax.lax.bitcast_convert_type(reaching_B, jnp.float32)[:, None]
    above_BW, equal_BW = probability_BW > threshold_B1, probability_BW == threshold_B1
    above_B1 = jnp.sum(jnp.where(above_BW, weight_BW, 0), axis=-1, keepdims=True)
    weight_of_equal_BW = jnp.where(equal_BW, weight_BW, 0)
    before_BW = above_B1 + jnp.cumsum(weight_of_equal_BW, axis=-1) - weight_of_equal_BW
    return above_BW | (equal_BW & (before_BW < target_B[:, None]))


def _restricted(probability_BW: Array, restricted_B: Array, kept: Callable[[Array], Array]) -> Array:
    """Rows of `restricted_B` to the ids `kept` gives for them, scaled to a sum of 1; costs nothing where none is."""

    def restrict(probability_BW: Array) -> Array:
        kept_probability_BW = jnp.where(kept(probability_BW), probability_BW, 0)
        normalized_BW = kept_probability_BW / kept_probability_BW.sum(axis=-1, keepdims=True)
        return jnp.where(restricted_B[:, None], normalized_BW, probability_BW)

    return jax.lax.cond(restricted_B.any(), restrict, lambda same: same, probability_BW)


def most_probable(logits_BW: Array) -> Array:
    """The id of the largest logit, of equals the lowest; W where a logit is NaN or none allows an id.

    [.., W] to [..], int32.
    """
    largest_B1 = logits_BW.max(axis=-1, keepdims=True)
    return _lowest((logits_BW == largest_B1) & (largest_B1 > -jnp.inf))


def _lowest(marked_BW: Array) -> Array:
    # XLA:CPU takes argmax one element at a time, ten times slower than this.
    width = marked_BW.shape[-1]
    return jnp.min(jnp.where(marked_BW, jnp.arange(width, dtype=jnp.int32), width), axis=-1)
