"""DeepSeek-V3 in float64 numpy, row by row, head by head and token by token (V3 sections 2.1, 2.2).

Takes the product's parameter trees and shares no code with it.
"""

import math
from typing import NamedTuple

import numpy as np

from dsv3_jax.model_config import ModelConfig
from tests.reference import rope
from tests.reference.routing import Gate, balance_loss, route
from tests.reference.weights import Tree, layer


class Row(NamedTuple):
    """One row of tokens; a token attends to earlier tokens of its own segment."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


def plain_row(tokens: np.ndarray, first_position: int = 0) -> Row:
    """One segment at consecutive positions."""
    return Row(tokens, first_position + np.arange(len(tokens)), np.ones(len(tokens), int))


def rms_norm(x_D: np.ndarray, gain_D: np.ndarray, epsilon: float) -> np.ndarray:
    return gain_D * x_D / math.sqrt(np.mean(np.square(x_D)) + epsilon)


def swiglu(x_D: np.ndarray, gate_up_D2F: np.ndarray, down_FD: np.ndarray) -> np.ndarray:
    gate, up = x_D @ gate_up_D2F[:, 0], x_D @ gate_up_D2F[:, 1]
    return (gate / (1.0 + np.exp(-gate)) * up) @ down_FD


def attention(x_SD: np.ndarray, row: Row, weights: Tree, model: ModelConfig) -> np.ndarray:
    """Equations 1 to 11: keys and values written out for every head, then the softmax of one query at a time."""
    nope, length = model.nope_head_dim, len(x_SD)
    key_HSd = np.zeros((model.heads, length, nope + model.rope_head_dim))
    value_HSV = np.zeros((model.heads, length, model.value_head_dim))
    out_SD = np.zeros_like(x_SD)
    for at, x_D in enumerate(x_SD):
        latent, shared_key = cached(x_D, row.positions[at], weights, model)
        for head in range(model.heads):
            up = latent @ weights["key_value_up"][:, head]
            key_HSd[head, at] = np.concatenate([up[:nope], shared_key])
            value_HSV[head, at] = up[nope:]
        seen = [other for other in range(at + 1) if row.segments[other] == row.segments[at]]
        for head, query in enumerate(_queries(x_D, row.positions[at], weights, model)):
            logits = rope.softmax_scale(model) * (key_HSd[head, seen] @ query)
            powers = np.exp(logits - logits.max())
            out_SD[at] += powers / powers.sum() @ value_HSV[head, seen] @ weights["output"][head]
    return out_SD


def cached(x_D: np.ndarray, position: int, weights: Tree, model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """What decoding has to remember of a token: the normed latent and the rotated, un-normed key of all heads."""
    down = x_D @ weights["key_value_down"]
    latent, key = down[: model.key_value_latent], down[model.key_value_latent :]
    normed = rms_norm(latent, weights["key_value_norm"]["gain"], model.latent_norm_epsilon)
    return normed, rope.rotate(key, position, model)


def _queries(x_D: np.ndarray, position: int, weights: Tree, model: ModelConfig) -> list[np.ndarray]:
    nope = model.nope_head_dim
    if model.query_latent is None:
        heads = [x_D @ weights["query"][:, head] for head in range(model.heads)]
    else:
        latent = rms_norm(x_D @ weights["query_down"], weights["query_norm"]["gain"], model.latent_norm_epsilon)
        heads = [latent @ weights["query_up"][:, head] for head in range(model.heads)]
    return [np.concatenate([query[:nope], rope.rotate(query[nope:], position, model)]) for query in heads]


def mixture_of_experts(
    x_SD: np.ndarray, weights: Tree, bias_E: np.ndarray | None, model: ModelConfig
) -> tuple[np.ndarray, list[Gate]]:
    """Each token through its own experts, weighted, plus the shared expert, unweighted."""
    out_SD, gates = np.zeros_like(x_SD), []
    for at, x_D in enumerate(x_SD):
        gate = route(x_D, weights["router"]["weight"], bias_E, model)
        for expert, weight in zip(gate.experts, gate.weights, strict=True):
            experts = weights["experts"]
            out_SD[at] += weight * swiglu(x_D, experts["gate_up"][expert], experts["down"][expert])
        if model.shared_experts:
            out_SD[at] += swiglu(x_D, weights["shared"]["gate_up"], weights["shared"]["down"])
        gates.append(gate)
    return out_SD, gates


def block(
    x_SD: np.ndarray, row: Row, weights: Tree, bias_E: np.ndarray | None, model: ModelConfig
) -> tuple[np.ndarray, list[Gate]]:
    """One block; gates are empty where it has no experts."""
    x_SD = x_SD + attention(_norm_rows(x_SD, weights["attention_norm"], model), row, weights["attention"], model)
    normed_SD = _norm_rows(x_SD, weights["feed_forward_norm"], model)
    feed_forward = weights["feed_forward"]
    if "experts" in feed_forward:
        fed_SD, gates = mixture_of_experts(normed_SD, feed_forward, bias_E, model)
    else:
        fed_SD = np.stack([swiglu(x_D, feed_forward["gate_up"], feed_forward["down"]) for x_D in normed_SD])
        gates = []
    return x_SD + fed_SD, gates


def hidden_states(
    row: Row, parameters: Tree, router_bias: Tree, model: ModelConfig
) -> tuple[np.ndarray, list[list[Gate]]]:
    """The residual stream after the last block and the gates of every block with experts."""
    x_SD, gates = parameters["embedding"][row.tokens].astype(np.float64), []
    for index in range(model.layers):
        if index < model.dense_layers:
            x_SD, _ = block(x_SD, row, layer(parameters["dense_blocks"], index), None, model)
        else:
            at = index - model.dense_layers
            bias_E = _bias(router_bias["moe_blocks"])[at] if model.selection_bias else None
            x_SD, of_block = block(x_SD, row, layer(parameters["moe_blocks"], at), bias_E, model)
            gates.append(of_block)
    return x_SD, gates


def logits(row: Row, parameters: Tree, router_bias: Tree, model: ModelConfig) -> np.ndarray:
    """[S, W], of the next token."""
    x_SD, _ = hidden_states(row, parameters, router_bias, model)
    return _norm_rows(x_SD, parameters["norm"], model) @ parameters["head"]


def mtp_states(
    hidden_SD: np.ndarray, row: Row, parameters: Tree, router_bias: Tree, model: ModelConfig
) -> tuple[list[np.ndarray], list[list[Gate]]]:
    """States for the shared head and gates of each MTP module, each for as many positions as have a token to embed.

    Section 2.2, with the embedding before the hidden state. `row` holds the tokens after the last position too: module
    k (from 1) at position i reads token i + k. Its own final norm is what the head and the next module read.
    """
    state_SD = _norm_rows(hidden_SD, parameters["norm"], model) if model.mtp_input == "final_norm" else hidden_SD
    states, gates = [], []
    for depth in range(1, model.mtp_depth + 1):
        weights = parameters["mtp"][depth - 1]
        count = min(len(row.tokens) - depth, len(state_SD))
        inputs = []
        for at in range(count):
            embedding = parameters["embedding"][row.tokens[at + depth]]
            both = [
                rms_norm(embedding, weights["embedding_norm"]["gain"], model.norm_epsilon),
                rms_norm(state_SD[at], weights["hidden_norm"]["gain"], model.norm_epsilon),
            ]
            inputs.append(np.concatenate(both) @ weights["projection"])
        bias_E = _bias(router_bias["mtp"][depth - 1]["block"]) if model.selection_bias else None
        x_SD, of_module = block(np.stack(inputs), row, weights["block"], bias_E, model)
        state_SD = _norm_rows(x_SD, weights["norm"], model)
        states.append(state_SD)
        gates.append(of_module)
    return states, gates


def objective(
    rows: list[np.ndarray],
    parameters: Tree,
    router_bias: Tree,
    model: ModelConfig,
    mtp_weight: float,
    balance_weight: float,
) -> float:
    """Next token + lambda / depth * MTP + alpha * balance, of rows of S + 1 tokens, each one document.

    A token loss is a mean over the tokens predicted; balance is summed over gates and averaged over rows. Position S
    of a row only predicts nothing: it is a label. The module k's statistics count positions with a token to predict.
    """
    sequence = len(rows[0]) - 1
    totals, balance = [0.0] * (model.mtp_depth + 1), 0.0
    for tokens in rows:
        row = plain_row(tokens[:-1])
        hidden_SD, gates = hidden_states(row, parameters, router_bias, model)
        states, of_modules = mtp_states(hidden_SD, plain_row(tokens), parameters, router_bias, model)
        states.insert(0, _norm_rows(hidden_SD, parameters["norm"], model))
        for depth, state_SD in enumerate(states):
            for at in range(sequence - depth):
                totals[depth] += surprise(state_SD[at] @ parameters["head"], tokens[at + depth + 1])
        balance += sum(balance_loss(of_block, model) for of_block in gates)
        balance += sum(
            balance_loss(of_module[: sequence - depth], model) for depth, of_module in enumerate(of_modules, start=1)
        )
    means = [total / (len(rows) * (sequence - depth)) for depth, total in enumerate(totals)]
    mtp = sum(means[1:]) / max(model.mtp_depth, 1)
    return means[0] + mtp_weight * mtp + balance_weight * balance / len(rows)


def surprise(logits_W: np.ndarray, label: int) -> float:
    """-log softmax(logits)[label]."""
    top = logits_W.max()
    return float(top + np.log(np.exp(logits_W - top).sum()) - logits_W[label])


def _norm_rows(x_SD: np.ndarray, norm: Tree, model: ModelConfig) -> np.ndarray:
    return np.stack([rms_norm(x_D, norm["gain"], model.norm_epsilon) for x_D in x_SD])


def _bias(of_block: Tree) -> np.ndarray:
    return of_block["feed_forward"]["router"]["bias"]
