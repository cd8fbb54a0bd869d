"""What changes over a run, as functions of the optimizer step (V3 section 4.2); all float32 scalars, jit or not."""

import jax.numpy as jnp
from jax import Array

from dsv3_jax.config import Config, LossConfig, OptimizerConfig
from dsv3_jax.training.losses import LossWeights


def learning_rate(step: Array | int, optimizer: OptimizerConfig, steps: int) -> Array:
    """Rate of the step with this index, from 0: linear warm-up, constant, cosine, then two constant tails.

    The first step already moves: warm-up counts steps finished after this one.
    """
    share = step / steps
    warmup = jnp.minimum((step + 1) / max(optimizer.warmup_steps, 1), 1.0)
    cosine_length = max(optimizer.cosine_until - optimizer.constant_until, 1e-9)
    progress = jnp.clip((share - optimizer.constant_until) / cosine_length, 0.0, 1.0)
    cosine = optimizer.first_tail_ratio + (1 - optimizer.first_tail_ratio) * (1 + jnp.cos(jnp.pi * progress)) / 2
    ratio = jnp.where(share < optimizer.first_tail_until, cosine, optimizer.second_tail_ratio)
    return jnp.asarray(optimizer.learning_rate * warmup * ratio, jnp.float32)


def loss_weights(step: Array | int, loss: LossConfig, steps: int) -> LossWeights:
    """Weights of the MTP loss (high, then low) and of the balance loss (constant)."""
    early = step / steps < loss.mtp_weight_until
    return LossWeights(
        jnp.where(early, loss.mtp_weight, loss.mtp_late_weight).astype(jnp.float32),
        jnp.asarray(loss.balance_weight, jnp.float32),
        loss.teacher_weight,
    )


def bias_speed(step: Array | int, config: Config) -> Array:
    """Step of the router bias: constant, then 0."""
    moving = step / config.training.steps < config.loss.bias_until
    return jnp.where(moving, config.loss.bias_speed, 0.0).astype(jnp.float32)
