"""Rotary positions with YaRN as complex numbers, float64, one value at a time.

Written from YaRN section 3 and DeepSeek-V3 section 4.3; the ramp runs over the pair index between rounded ends and is
clamped at rope_head_dim - 1, as in the code released with the weights.
"""

import cmath
import math

import numpy as np

from dsv3_jax.model_config import ModelConfig


def pair_frequency(model: ModelConfig, pair: int) -> float:
    """Radians a position of one pair of dims."""
    dims, base = model.rope_head_dim, model.rope_theta
    frequency = 1.0 / base ** (2.0 * pair / dims)
    if model.yarn_factor == 1.0:
        return frequency
    low = max(int(math.floor(_pair_with_turns(model, model.yarn_beta_fast))), 0)
    high = min(int(math.ceil(_pair_with_turns(model, model.yarn_beta_slow))), dims - 1)
    if pair <= low:
        interpolated = 0.0
    elif pair >= high:
        interpolated = 1.0
    else:
        interpolated = (pair - low) / (high - low)
    return interpolated * frequency / model.yarn_factor + (1.0 - interpolated) * frequency


def _pair_with_turns(model: ModelConfig, turns: float) -> float:
    """The (fractional) pair whose wavelength fits `turns` times into the original length.

    wavelength(i) = 2 pi base^(2 i / dims) = length / turns, solved for i.
    """
    wavelength = model.yarn_original_length / turns
    return model.rope_head_dim / 2.0 * math.log(wavelength / (2.0 * math.pi), model.rope_theta)


def magnitude(model: ModelConfig) -> float:
    """Length of the complex rotation: the ratio of the two mscale factors."""
    return _mscale(model, model.yarn_mscale) / _mscale(model, model.yarn_mscale_all_dim)


def softmax_scale(model: ModelConfig) -> float:
    return _mscale(model, model.yarn_mscale_all_dim) ** 2 / math.sqrt(model.nope_head_dim + model.rope_head_dim)


def _mscale(model: ModelConfig, coefficient: float) -> float:
    return 1.0 if model.yarn_factor <= 1.0 else 1.0 + coefficient * math.log(model.yarn_factor) / 10.0


def rotate(vector_R: np.ndarray, position: int, model: ModelConfig) -> np.ndarray:
    """The vector at a position: pair (2i, 2i + 1) is a complex number, turned by position * frequency."""
    turned = np.zeros(model.rope_head_dim)
    for pair in range(model.rope_head_dim // 2):
        number = complex(vector_R[2 * pair], vector_R[2 * pair + 1])
        number *= cmath.rect(magnitude(model), position * pair_frequency(model, pair))
        turned[2 * pair], turned[2 * pair + 1] = number.real, number.imag
    return turned
