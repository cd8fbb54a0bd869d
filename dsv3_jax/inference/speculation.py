"""Speculative decoding with the MTP module: it drafts, the model verifies all drafts in one pass (V3 section 5.4.3).

The result is the model's own, whatever the drafts: greedily token for token, at a temperature in distribution
(speculative sampling, arXiv 2211.17192). With p what the model draws a token from and q what the draft was drawn from,
a draft d stays with probability min(1, p(d) / q(d)), and the first that does not is replaced by a draw from
max(p - q, 0).
A greedy row is the case where p and q are each 1 at one token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv3_jax.inference.sampling import SamplingInputs, draw, most_probable, probabilities, uniforms

# Which of a position's independent random numbers: a token drawn from p needs one, a draft two more.
ACCEPTING, DRAFTING, REPLACING = 1, 2, 3


class Drafts(NamedTuple):
    """k tokens guessed ahead of a row's newest one."""

    tokens_Bk: Array
    """int32."""
    probability_BkW: Array
    """float32, what each was drawn from; zeros where every row is greedy."""


class Verdict(NamedTuple):
    accepted_B: Array
    """int32, how many drafts stay: the first so many."""
    next_B: Array
    """int32, the token after them, the model's own."""


def draft_token(logits_BW: Array, inputs: SamplingInputs, positions_B: Array) -> tuple[Array, Array]:
    """A draft a row, int32 [B], for the given positions, and what it was drawn from, float32 [B, W]."""

    def drawn() -> tuple[Array, Array]:
        probability_BW = probabilities(logits_BW, inputs)
        return draw(probability_BW, uniforms(inputs, positions_B, DRAFTING)), probability_BW

    def taken() -> tuple[Array, Array]:
        return most_probable(logits_BW), jnp.zeros_like(logits_BW)

    return jax.lax.cond((inputs.temperature_B > 0).any(), drawn, taken)


def verify(logits_BnW: Array, drafts: Drafts, inputs: SamplingInputs, positions_B: Array) -> Verdict:
    """Which drafts stay, and what follows them.

    Args:
        logits_BnW: n = k + 1, the model's, after the newest token and after each draft.
        drafts: of the positions from `positions_B` on.
        positions_B: int32, position of the first draft.
    """
    any_drawn = (inputs.temperature_B > 0).any()
    return jax.lax.cond(any_drawn, _sampled, _greedy, logits_BnW, drafts, inputs, positions_B)


def _greedy(logits_BnW: Array, drafts: Drafts, inputs: SamplingInputs, positions_B: Array) -> Verdict:
    best_Bn = most_probable(logits_BnW)
    accepted_B = _leading(best_Bn[:, :-1] == drafts.tokens_Bk)
    return Verdict(accepted_B, jnp.take_along_axis(best_Bn, accepted_B[:, None], axis=1)[:, 0])


def _sampled(logits_BnW: Array, drafts: Drafts, inputs: SamplingInputs, positions_B: Array) -> Verdict:
    over_positions = jax.vmap(probabilities, in_axes=(1, None), out_axes=1)
    target_BnW, depth = over_positions(logits_BnW, inputs), drafts.tokens_Bk.shape[1]

    def at(probability_BkW: Array) -> Array:
        return jnp.take_along_axis(probability_BkW, drafts.tokens_Bk[..., None], axis=2)[..., 0]

    uniform_Bk = jnp.stack([uniforms(inputs, positions_B + place, ACCEPTING) for place in range(depth)], axis=1)
    accepted_B = _leading(uniform_Bk * at(drafts.probability_BkW) < at(target_BnW[:, :-1]))

    # After the last draft there is nothing to subtract.
    whole_BnW = jnp.pad(drafts.probability_BkW, ((0, 0), (0, 1), (0, 0)))
    chosen_B11 = accepted_B[:, None, None]
    target_BW, drafted_BW = (jnp.take_along_axis(x, chosen_B11, axis=1)[:, 0] for x in (target_BnW, whole_BnW))
    rest_BW = jnp.maximum(target_BW - drafted_BW, 0)
    # Rounding may leave nothing where p and q are the same; a draft was then refused with probability of about 0.
    rest_BW = jnp.where(rest_BW.sum(axis=-1, keepdims=True) > 0, rest_BW, target_BW)
    next_B = draw(rest_BW, uniforms(inputs, positions_B + accepted_B, REPLACING))
    # NaN logits are no distribution: as in plain decoding, W says so.
    bad_B = jnp.isnan(target_BnW).any(axis=(1, 2))
    return Verdict(jnp.where(bad_B, 0, accepted_B), jnp.where(bad_B, logits_BnW.shape[-1], next_B))


def _leading(marked_Bk: Array) -> Array:
    """How many of each row are true before the first that is not, int32."""
    return jnp.cumprod(marked_Bk.astype(jnp.int32), axis=1).sum(axis=1)
