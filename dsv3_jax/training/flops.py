"""Parameters, training FLOPs and matmul speed of a model, all from one list of its linears."""

import statistics
import time
from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model_config import ModelConfig

SECONDS_A_SHAPE = 0.03
LEAST_REPEATS = 5


class Linear(NamedTuple):
    """Equal matrices [inputs, outputs] of the model: how many there are, and how many of them one token passes."""

    inputs: int
    outputs: int
    stored: int
    used: int

    @property
    def size(self) -> int:
        return self.inputs * self.outputs


class ParameterCounts(NamedTuple):
    main: int
    """The main model: embedding, blocks, final norm, head, router biases."""
    mtp: int
    """What the MTP modules add; the embedding and the head they share with the main model are not in it."""
    active: int
    """Of the main model, what one token passes: head counted, embedding lookup not, as in the papers' figures."""


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Parameters by formula, nothing allocated."""
    main, mtp = main_linears(model), mtp_linears(model)
    block_norms = 2 * model.width + model.key_value_latent + (model.query_latent or 0)
    biases = model.experts if model.selection_bias else 0
    vectors = model.layers * block_norms + model.moe_layers * biases + model.width
    mtp_vectors = model.mtp_depth * (block_norms + biases + 3 * model.width)
    embedding = model.width * model.vocabulary
    return ParameterCounts(
        main=sum(linear.stored * linear.size for linear in main) + vectors + embedding,
        mtp=sum(linear.stored * linear.size for linear in mtp) + mtp_vectors,
        active=sum(linear.used * linear.size for linear in main) + vectors,
    )


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one training token by formula, recomputation not counted:

        6 * (entries of the matrices it passes: attention, router, K routed and the shared experts, dense FFN, head;
             each MTP module: its [2D, D] projection, its block, the head again)
      + 3 * 2 * H * (P + R + V) * (S + 1) / 2    for each block, MTP blocks included

    2 a multiply-add, 3 for forward and twice that backward; (S + 1) / 2 is the mean length of causal attention.
    The embedding lookup is no matmul and counts nothing.
    """
    linears = main_linears(model) + mtp_linears(model)
    attention = model.heads * (model.query_key_head_dim + model.value_head_dim) * (sequence_length + 1) / 2
    blocks = model.layers + model.mtp_depth
    return 6.0 * sum(linear.used * linear.size for linear in linears) + 3 * 2 * blocks * attention


def forward_flops(model: ModelConfig, positions: int, *, decode: bool) -> float:
    """FLOPs of the main model on one row: `positions` tokens at once, or one more token against so many in the cache.

    As a training step's, with the head on the last token alone. Decoding absorbs the expansion of the latents: a head
    multiplies with C + R numbers a cached position for its logit, and C for its value, and key_value_up once a token.
    """
    head = model.width * model.vocabulary
    tokens = 1 if decode else positions
    matrices = 2.0 * (tokens * sum(linear.used * linear.size for linear in main_linears(model)) - (tokens - 1) * head)
    if decode:
        attention = 2.0 * model.heads * (model.cache_width + model.key_value_latent) * positions
    else:
        attention = model.heads * (model.query_key_head_dim + model.value_head_dim) * positions * (positions + 1)
    return matrices + model.layers * attention


def measured_matmul_rate(model: ModelConfig, tokens: int) -> float:
    """FLOP/s that plain jitted `x @ w` reaches here at the model's own forward shapes, in its compute type.

    Every distinct (rows, inputs, outputs) is timed alone, median of several runs: `tokens` rows for what all tokens
    pass, tokens * K / E for a routed expert. The rate is that of one forward pass made of nothing but these products:
    total FLOPs / total time. Takes about a second for a small model, compilation included.
    """
    calls: dict[tuple[int, int, int], int] = defaultdict(int)
    for linear in main_linears(model) + mtp_linears(model):
        rows = max(1, round(tokens * linear.used / linear.stored)) if linear.used < linear.stored else tokens
        matmuls = linear.stored if linear.used < linear.stored else linear.used
        calls[rows, linear.inputs, linear.outputs] += matmuls
    flops = sum(2.0 * rows * inputs * outputs * count for (rows, inputs, outputs), count in calls.items())
    return flops / sum(count * _matmul_seconds(shape, model.dtype) for shape, count in calls.items())


def main_linears(model: ModelConfig) -> list[Linear]:
    """Every matrix of the main model that is multiplied with, so all but the embedding."""
    blocks = [
        *_repeated(_attention(model), model.layers),
        *_repeated(_feed_forward(model.width, model.dense_ffn_width), model.dense_layers),
        *_repeated(_experts(model), model.moe_layers),
    ]
    return [*blocks, Linear(model.width, model.vocabulary, 1, 1)]


def mtp_linears(model: ModelConfig) -> list[Linear]:
    """The same for the MTP modules; the head is the main model's: used, not stored."""
    module = [
        Linear(2 * model.width, model.width, 1, 1),
        *_attention(model),
        *_experts(model),
        Linear(model.width, model.vocabulary, 0, 1),
    ]
    return _repeated(module, model.mtp_depth)


def _attention(model: ModelConfig) -> list[Linear]:
    queries = model.heads * model.query_key_head_dim
    if model.query_latent is None:
        query = [(model.width, queries)]
    else:
        query = [(model.width, model.query_latent), (model.query_latent, queries)]
    shapes = [
        *query,
        (model.width, model.cache_width),
        (model.key_value_latent, model.heads * (model.nope_head_dim + model.value_head_dim)),
        (model.heads * model.value_head_dim, model.width),
    ]
    return [Linear(inputs, outputs, 1, 1) for inputs, outputs in shapes]


def _feed_forward(width: int, hidden: int, stored: int = 1, used: int = 1) -> list[Linear]:
    return [Linear(width, 2 * hidden, stored, used), Linear(hidden, width, stored, used)]


def _experts(model: ModelConfig) -> list[Linear]:
    routed = _feed_forward(model.width, model.expert_ffn_width, model.experts, model.experts_per_token)
    shared = _feed_forward(model.width, model.shared_experts * model.expert_ffn_width) if model.shared_experts else []
    return [Linear(model.width, model.experts, 1, 1), *routed, *shared]


def _repeated(linears: list[Linear], times: int) -> list[Linear]:
    return [linear._replace(stored=times * linear.stored, used=times * linear.used) for linear in linears if times]


def _matmul_seconds(shape: tuple[int, int, int], precision: str) -> float:
    rows, inputs, outputs = shape
    noise = np.random.default_rng(0).standard_normal(4099)  # a prime length: repeated, its rows still differ
    x = jnp.asarray(np.resize(noise, (rows, inputs)), precision)
    w = jnp.asarray(np.resize(noise, (inputs, outputs)), precision)
    full = jax.lax.Precision.HIGHEST if precision == "float32" else jax.lax.Precision.DEFAULT
    multiply = jax.jit(lambda x, w: jnp.matmul(x, w, precision=full)).lower(x, w).compile()
    multiply(x, w).block_until_ready()
    seconds: list[float] = []
    while len(seconds) < LEAST_REPEATS or sum(seconds) < SECONDS_A_SHAPE:
        start = time.perf_counter()
        multiply(x, w).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
