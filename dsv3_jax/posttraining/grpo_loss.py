"""The objective of GRPO, token by token (DeepSeekMath equations 3 and 4), as a function of log probabilities alone.

    rho   = exp(new - old)                                                    old: the policy that the rollout is of
    J     = min(rho * A, clip(rho, 1 - low, 1 + high) * A) * min(exp(old - sampler), cap) - beta * KL
    loss  = - sum over tokens of weight * J                                   weights: `token_weights`

The weights carry the aggregation and its denominator over the whole batch of an update, so that any split of the batch
into parts gives the same gradient. All log probabilities are at the temperature that was sampled at.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3_jax.grpo_config import GRPOConfig, KLEstimator


class TokenValues(NamedTuple):
    """Of the tokens of an update, each [B, S]; what they hold where a token is not counted does not matter."""

    counted: Any
    """bool: a token of a response that has a verdict."""
    weights: Any
    """float32; `token_weights`."""
    advantages: Any
    sampler_logprobs: Any
    """What the sampler drew the token with."""
    old_logprobs: Any
    """Of the training code before the first update on this rollout; of a rollout that is used for one update the step
    finds them itself, and these are not read."""
    reference_logprobs: Any
    """Read where there is a reference."""


class LossSums(NamedTuple):
    """Sums over counted tokens, float32 scalars."""

    loss: Array
    """Of the whole batch, not a sum to be divided."""
    tokens: Array
    entropy: Array
    kl: Array
    """Of the new policy against the reference; 0 where there is none."""
    clipped_low: Array
    """Tokens whose gradient the lower bound takes away: rho below 1 - low, and a negative advantage."""
    clipped_high: Array
    ratio: Array
    """rho."""
    mismatch: Array
    """|old - sampler|."""
    mismatch_kl: Array
    """sampler - old: an estimate of KL(sampler || trainer)."""
    importance_capped: Array
    """Tokens whose importance weight is cut to the cap."""


def kl_estimate(estimator: KLEstimator, logprobs: Array, reference_logprobs: Array) -> Array:
    """An estimate of KL(policy || reference) from one token that was drawn from the policy; q = reference / policy.

    k1 = -log q is right on average, of either sign. k2 = (log q)^2 / 2 is biased, and its gradient is right. k3 =
    q - 1 - log q is right on average and never negative; its gradient is that of KL(reference || policy). The gradient
    of k1 is 0 on average: in the loss it does nothing but add noise, in the reward it is the one that is right.
    """
    log_q = reference_logprobs - logprobs
    if estimator == "k1":
        return -log_q
    return log_q * log_q / 2 if estimator == "k2" else jnp.exp(log_q) - 1 - log_q


def grpo_loss(new_logprobs: Array, entropies: Array, values: TokenValues, config: GRPOConfig) -> LossSums:
    """The loss and what is told of it, over the tokens of one part of a batch; [B, S] each."""
    counted = values.counted

    def of_counted(array: Array) -> Array:
        # Before anything is done with it: one infinity among padding makes the gradient NaN.
        return jnp.where(counted, array, 0.0)

    new, sampler = of_counted(new_logprobs), of_counted(values.sampler_logprobs)
    old = jax.lax.stop_gradient(new) if config.updates_per_rollout == 1 else of_counted(values.old_logprobs)
    advantages = of_counted(values.advantages)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    ratio = jnp.exp(new - old)
    objective = jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
    importance, capped = jnp.exp(old - sampler), jnp.zeros_like(counted)
    if config.importance_cap is not None:
        objective = objective * jnp.minimum(importance, config.importance_cap)
        capped = importance > config.importance_cap
    kl = jnp.zeros_like(new)
    if config.kl_weight:
        kl = kl_estimate(config.kl_estimator, new, of_counted(values.reference_logprobs))
        if config.kl_in == "loss":
            objective = objective - config.kl_weight * kl
    told = {
        "tokens": counted,
        "entropy": of_counted(entropies),
        "kl": kl,
        "clipped_low": counted & (ratio < low) & (advantages < 0),
        "clipped_high": counted & (ratio > high) & (advantages > 0),
        "ratio": of_counted(ratio),
        "mismatch": jnp.abs(old - sampler),
        "mismatch_kl": sampler - old,
        "importance_capped": counted & capped,
    }
    sums = {name: jax.lax.stop_gradient(array).astype(jnp.float32).sum() for name, array in told.items()}
    return LossSums(loss=-jnp.sum(of_counted(values.weights) * objective), **sums)


def token_weights(lengths_N: np.ndarray, judged_N: np.ndarray, config: GRPOConfig) -> np.ndarray:
    """The weight of every token of each response of an update, float32 [N]; 0 for those without a verdict.

    sequence: the mean over responses of their means over tokens (DeepSeekMath equation 3): a token of a long response
    counts less. token: the mean over all tokens (DAPO). constant: the sum over tokens, over responses and
    `max_new_tokens` (Dr. GRPO): every token counts alike in every batch.
    """
    responses = max(int(judged_N.sum()), 1)
    if config.aggregation == "sequence":
        weights_N = 1.0 / (np.maximum(lengths_N, 1) * responses)
    elif config.aggregation == "token":
        weights_N = np.full(len(lengths_N), 1.0 / max(int(lengths_N[judged_N].sum()), 1))
    else:
        weights_N = np.full(len(lengths_N), 1.0 / (responses * config.max_new_tokens))
    return np.where(judged_N, weights_N, 0.0).astype(np.float32)
