"""Rotary positions and their YaRN extension (V2 section 2.1.3, V3 section 4.3, YaRN sections 3.2 and 3.4)."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3_jax.model_config import ModelConfig

# A rotation: cos and sin, float32 [B or 1, S, R/2].
Rotation = tuple[Array, Array]


def frequencies(model: ModelConfig) -> np.ndarray:
    """Radians a position of each of the R/2 dim pairs, float64 [R/2], YaRN applied.

    YaRN keeps frequencies that turn more than beta_fast times over the original length, divides those below
    beta_slow by the factor, and ramps linearly in the pair index between. The ramp's upper end is clamped to
    R - 1, not to R/2 - 1: the released code does so, and the released weights were trained with it.
    """
    rope_dim = model.rope_head_dim
    pairs = np.arange(rope_dim // 2)
    plain = model.rope_theta ** (-2.0 * pairs / rope_dim)

    def pair_turning(rotations: float) -> float:
        return (
            rope_dim
            * math.log(model.yarn_original_length / (2 * math.pi * rotations))
            / (2 * math.log(model.rope_theta))
        )

    low = max(math.floor(pair_turning(model.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_turning(model.yarn_beta_slow)), rope_dim - 1)
    ramp = np.clip((pairs - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return plain * (1.0 - ramp) + plain / model.yarn_factor * ramp


def softmax_scale(model: ModelConfig) -> float:
    """Factor on the whole attention logit: (P + R)^-1/2, times mscale_all_dim's factor squared under YaRN."""
    return model.query_key_head_dim**-0.5 * _mscale(model.yarn_factor, model.yarn_mscale_all_dim) ** 2


def rotation(model: ModelConfig, positions_BS: Array) -> Rotation:
    """cos and sin at integer positions, each float32 [B, S, R/2].

    Both carry mscale / mscale_all_dim, which is 1 in every released model.
    """
    ratio = _mscale(model.yarn_factor, model.yarn_mscale) / _mscale(model.yarn_factor, model.yarn_mscale_all_dim)
    angles = positions_BS[..., None].astype(jnp.float32) * jnp.asarray(frequencies(model), jnp.float32)
    return jnp.cos(angles) * ratio, jnp.sin(angles) * ratio


def rotate(x: Array, by: Rotation) -> Array:
    """Rotate the pairs (2i, 2i+1) of the last dim of x [B, S, ..., R]: the released weights' interleaved layout.

    The result keeps the interleaved order, in the type of x; the rotation itself is float32.
    """
    cos, sin = (jnp.expand_dims(part, range(2, x.ndim - 1)) for part in by)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _mscale(factor: float, coefficient: float) -> float:
    """0.1 * coefficient * ln(factor) + 1: 1.3689 at factor 40, 1 without extension."""
    return 0.1 * coefficient * math.log(factor) + 1.0
