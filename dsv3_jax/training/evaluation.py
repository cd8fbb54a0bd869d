"""Validation: the next-token loss over every held-out token, and what it means in bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, Tree, parameter_specs, put_together
from dsv3_jax.model.layers import whole
from dsv3_jax.training.cross_entropy import cross_entropy
from dsv3_jax.training.losses import Batch, Targets, targets
from sharding.collectives import summed
from sharding.context import context_part
from sharding.mesh import TOKEN_AXES, on_mesh, place_rows, row_spec


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


def make_evaluate(config: Config, skeleton: Skeleton, mesh: Mesh) -> Callable[[Tree, Tree, Iterable[dict]], Evaluation]:
    """A function of parameters, router bias and batches (as `validation_batches` yields them). It updates nothing."""

    def summed_loss(parameters: Tree, router_bias: Tree, batch: Batch) -> tuple[Array, Array]:
        model = put_together(skeleton, parameters, router_bias)
        ahead = Targets(*map(context_part, targets(batch, mtp_depth=0)))
        tokens_BS, segment_ids_BS, positions_BS = (context_part(rows[:, :-1]) for rows in batch[:3])
        isolated_BS = segment_ids_BS if config.data.isolated else None
        hidden_BSD, _ = model.hidden_states(tokens_BS, positions_BS, isolated_BS)
        loss = cross_entropy(
            model.norm(hidden_BSD).reshape(-1, config.model.width),
            whole(model.head, jnp.dtype(config.model.dtype)),
            ahead.following.reshape(-1),
            ahead.counted.reshape(-1),
        )
        return summed(loss, TOKEN_AXES), summed(ahead.counted.sum(), TOKEN_AXES)

    specs = (*parameter_specs(skeleton, mesh), row_spec(mesh))
    compiled = jax.jit(on_mesh(summed_loss, mesh, specs, PartitionSpec()))

    def evaluate(parameters: Tree, router_bias: Tree, batches: Iterable[dict]) -> Evaluation:
        def placed(batch: dict) -> Batch:
            return Batch(**{name: place_rows({0: rows}, len(rows), mesh) for name, rows in batch.items()})

        sums = [compiled(parameters, router_bias, placed(batch)) for batch in batches]
        return Evaluation(sum(float(nats) for nats, _ in sums), sum(int(tokens) for _, tokens in sums))

    return evaluate
