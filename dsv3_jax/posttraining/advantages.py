"""From the rewards of a group of answers to one advantage an answer (DeepSeekMath section 4.1, V3 equation 28)."""

from typing import NamedTuple

import numpy as np

EPSILON = 1e-6
"""Added to the standard deviation; no paper states it, nor that the deviation is the population's, as here."""


class Advantages(NamedTuple):
    values_PG: np.ndarray
    """float32; 0 where there is nothing to learn from."""
    mixed_P: np.ndarray
    """bool: the group's answers differ in what the verifier gave them."""


def group_advantages(
    rewards_PG: np.ndarray, verified_PG: np.ndarray, judged_PG: np.ndarray, divide_by_std: bool
) -> Advantages:
    """(reward - mean) / std over each group, without the division if so told (Dr. GRPO).

    A group whose answers the verifier finds all equal teaches nothing, whatever penalties for length or KL make of
    them: taken by the shaped reward, such groups would push the policy along those alone, scaled up to a standard
    deviation of 1. Equal means the same number, not a standard deviation of 0, which rounding may miss.

    Args:
        rewards_PG: what is maximised, [prompts, group].
        verified_PG: the part of it that comes from the verifier.
        judged_PG: bool; answers without a verdict are in no mean and have no advantage.
    """
    count_P1 = np.maximum(judged_PG.sum(axis=1, keepdims=True), 1)
    highest_P = np.where(judged_PG, verified_PG, -np.inf).max(axis=1)
    lowest_P = np.where(judged_PG, verified_PG, np.inf).min(axis=1)
    mixed_P = highest_P > lowest_P
    rewards_PG = np.where(judged_PG, rewards_PG, 0.0).astype(np.float64)
    centred_PG = np.where(judged_PG, rewards_PG - rewards_PG.sum(axis=1, keepdims=True) / count_P1, 0.0)
    if divide_by_std:
        std_P1 = np.sqrt((centred_PG**2).sum(axis=1, keepdims=True) / count_P1)
        centred_PG = centred_PG / (std_P1 + EPSILON)
    return Advantages(np.where(mixed_P[:, None], centred_PG, 0.0).astype(np.float32), mixed_P)
