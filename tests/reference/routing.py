"""The gate, the balance loss and the bias update, one token and one expert at a time, in float64 (V3 section 2.1.2)."""

import math
from typing import NamedTuple

import numpy as np

from dsv3_jax.model_config import ModelConfig


class Gate(NamedTuple):
    """One token's routing."""

    experts: list[int]
    """Chosen experts, best selection score first."""
    weights: list[float]
    scores: np.ndarray
    """Of all experts, without the bias."""


def route(x_D: np.ndarray, weight_DE: np.ndarray, bias_E: np.ndarray | None, model: ModelConfig) -> Gate:
    """Equations 12 to 16 with the group limit."""
    logits = [float(np.dot(x_D, weight_DE[:, expert])) for expert in range(model.experts)]
    if model.score_function == "sigmoid":
        scores = [1.0 / (1.0 + math.exp(-logit)) for logit in logits]
    else:
        powers = [math.exp(logit - max(logits)) for logit in logits]
        scores = [power / sum(powers) for power in powers]
    selection = [score + (0.0 if bias_E is None else float(bias_E[expert])) for expert, score in enumerate(scores)]
    allowed = _experts_of_best_groups(selection, model)
    chosen = sorted(allowed, key=lambda expert: -selection[expert])[: model.experts_per_token]
    weights = [scores[expert] for expert in chosen]
    if model.normalize_weights:
        total = sum(weights)
        weights = [weight / total for weight in weights]
    return Gate(chosen, [model.routed_scale * weight for weight in weights], np.array(scores))


def _experts_of_best_groups(selection: list[float], model: ModelConfig) -> list[int]:
    size = model.experts // model.expert_groups
    groups = [list(range(group * size, (group + 1) * size)) for group in range(model.expert_groups)]
    counted = 1 if model.group_score == "max" else 2

    def score(group: list[int]) -> float:
        return sum(sorted((selection[expert] for expert in group), reverse=True)[:counted])

    best = sorted(groups, key=score, reverse=True)[: model.groups_per_token]
    return sorted(expert for group in best for expert in group)


def balance_loss(gates: list[Gate], model: ModelConfig) -> float:
    """Equations 17 to 20 of one sequence (its padding already left out), without alpha; f counts real selections."""
    if not gates:
        return 0.0
    length, total = len(gates), 0.0
    for expert in range(model.experts):
        chosen = sum(expert in gate.experts for gate in gates)
        share = model.experts / (model.experts_per_token * length) * chosen
        probability = sum(gate.scores[expert] / sum(gate.scores) for gate in gates) / length
        total += share * probability
    return total


def load(gates: list[Gate], model: ModelConfig) -> list[int]:
    """Tokens sent to each expert."""
    return [sum(expert in gate.experts for gate in gates) for expert in range(model.experts)]


def updated_bias(bias: list[float], counts: list[int], speed: float) -> list[float]:
    """Up where an expert got less than the mean, down where it got more, compared in exact integers."""
    moved = []
    for value, count in zip(bias, counts, strict=True):
        missing = sum(counts) - len(counts) * count
        moved.append(value + (speed if missing > 0 else -speed if missing < 0 else 0.0))
    return moved
