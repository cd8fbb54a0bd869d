"""Validation: the next-token loss over every held-out token, and what it means in bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
from jax import Array

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, Tree, put_together
from dsv3_jax.training.cross_entropy import cross_entropy
from dsv3_jax.training.losses import Batch, targets


class Evaluation(NamedTuple):
    nats: float
    """Summed over the predicted tokens."""
    tokens: int
    """Predicted tokens."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / max(self.tokens, 1)

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits spent on all predicted tokens, ends of documents included, a byte of the text they stand for."""
        return self.nats / math.log(2) / text_bytes


def make_evaluate(config: Config, skeleton: Skeleton) -> Callable[[Tree, Tree, Iterable[dict]], Evaluation]:
    """A function of parameters, router bias and batches (as `validation_batches` yields them). It updates nothing."""

    @jax.jit
    def summed_loss(parameters: Tree, router_bias: Tree, batch: Batch) -> tuple[Array, Array]:
        model = put_together(skeleton, parameters, router_bias)
        ahead = targets(batch, mtp_depth=0)
        segment_ids_BS = batch.segment_ids[:, :-1] if config.data.isolate_documents else None
        hidden_BSD, _ = model.hidden_states(batch.tokens[:, :-1], batch.positions[:, :-1], segment_ids_BS)
        loss = cross_entropy(
            model.norm(hidden_BSD).reshape(-1, config.model.width),
            model.head[...],
            ahead.following.reshape(-1),
            ahead.counted.reshape(-1),
        )
        return loss, ahead.counted.sum()

    def evaluate(parameters: Tree, router_bias: Tree, batches: Iterable[dict]) -> Evaluation:
        sums = [summed_loss(parameters, router_bias, Batch(**batch)) for batch in batches]
        return Evaluation(sum(float(nats) for nats, _ in sums), sum(int(tokens) for _, tokens in sums))

    return evaluate
