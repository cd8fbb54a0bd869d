"""The objective: next token + lambda / D * MTP + alpha * balance (V3 equations 17-20, 24, 25)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from dsv3_jax.model.layers import whole
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.training.cross_entropy import cross_entropy
from dsv3_jax.training.distillation import teacher_loss
from sharding.context import context_part


class Batch(NamedTuple):
    """Rows of one token more than the model reads, so that inputs and labels overlap; each int32 [B, S + 1]."""

    tokens: Any
    segment_ids: Any
    """Document of each token within the row, from 1; 0 is padding. All 1 when documents are not isolated."""
    positions: Any
    learnt: Any = None
    """1 for tokens to be predicted, 0 for those that are only read, as prompts are; None: all are to be predicted."""


class Targets(NamedTuple):
    """What each position reads ahead and predicts. Depth 0 is the main model, depth k the k-th MTP module."""

    following: Array
    """int32 [B, S, mtp_depth + 1]: token 1, 2, ... after each position; 0 past the row's end."""
    counted: Array
    """bool, same shape: the token exists, belongs to the position's own document, and is to be predicted."""


class LossWeights(NamedTuple):
    """float32 scalars that depend on how far the run is."""

    mtp: Array
    balance: Array
    teacher: float = 0.0
    """Share of a teacher's probabilities in what predicts the next token; the rest are the labels'."""


class Losses(NamedTuple):
    """Sums or means (as `loss_sums` or `mean_losses` returns them), float32."""

    next_token: Array
    """Scalar, nats a token."""
    mtp: Array
    """[mtp_depth], nats a token, each over its own valid positions."""
    balance: Array
    """Scalar, a row and layer: 1 is balanced. No weight applied."""
    teacher: Array | None = None
    """Scalar, nats a token: how far the next token's probabilities are from a teacher's; None: there is none."""


class LossCounts(NamedTuple):
    """Denominators over the whole batch of an optimizer step, so that any split of it gives the same gradient."""

    tokens: Array
    """int32 [mtp_depth + 1]: predicted tokens of each depth."""
    rows: Array
    """int32: rows with any token."""


def targets(batch: Batch, mtp_depth: int) -> Targets:
    """Labels and their validity. One shift for the next token, k + 1 for MTP depth k, none across documents."""
    sequence = batch.tokens.shape[1] - 1
    following, counted = [], []
    for shift in range(1, mtp_depth + 2):
        missing = ((0, 0), (0, shift - 1))
        following.append(jnp.pad(batch.tokens[:, shift:], missing)[:, :sequence])
        # Padding has segment 0, and so has everything past the end of the row.
        segment = jnp.pad(batch.segment_ids[:, shift:], missing)[:, :sequence]
        own = (segment == batch.segment_ids[:, :sequence]) & (segment > 0)
        # The mask goes with the token that is predicted: of depth k it is rolled as far as the labels are.
        learnt = True if batch.learnt is None else jnp.pad(batch.learnt[:, shift:], missing)[:, :sequence] > 0
        counted.append(own & learnt)
    return Targets(jnp.stack(following, axis=-1), jnp.stack(counted, axis=-1))


def loss_counts(batch: Batch, mtp_depth: int) -> LossCounts:
    counted = targets(batch, mtp_depth).counted
    return LossCounts(counted.sum(axis=(0, 1)), (batch.segment_ids[:, :-1] > 0).any(axis=1).sum())


class TeacherModel(NamedTuple):
    """A model whose probabilities are learnt."""

    model: Transformer
    temperature: float


def loss_sums(
    model: Transformer, batch: Batch, *, isolate_documents: bool, teacher: TeacherModel | None = None
) -> tuple[Losses, list[Array]]:
    """Sums of every loss over the batch, and the load [.., E] of every router in the order of `router_biases`."""
    config = model.model
    ahead = Targets(*map(context_part, targets(batch, config.mtp_depth)))
    tokens_BS, document_BS, positions_BS = (context_part(rows[:, :-1]) for rows in batch[:3])
    present_BS = document_BS > 0
    segment_ids_BS = document_BS if isolate_documents else None
    hidden_BSD, of_blocks = model.hidden_states(tokens_BS, positions_BS, segment_ids_BS, present_BS)
    states, of_modules = model.mtp_states(
        hidden_BSD, ahead.following[..., :-1], positions_BS, segment_ids_BS, ahead.counted[..., 1:]
    )

    head_DW = whole(model.head, jnp.dtype(config.dtype))

    def token_loss(normed_BSD: Array, depth: int) -> Array:
        return cross_entropy(
            normed_BSD.reshape(-1, config.width),
            head_DW,
            ahead.following[..., depth].reshape(-1),
            ahead.counted[..., depth].reshape(-1),
        )

    mtp = [token_loss(state, depth) for depth, state in enumerate(states, start=1)]
    statistics = ([of_blocks] if of_blocks is not None else []) + of_modules
    normed_BSD = model.norm(hidden_BSD)
    losses = Losses(
        token_loss(normed_BSD, 0),
        jnp.stack(mtp) if mtp else jnp.zeros((0,), jnp.float32),
        sum((one.balance.sum() for one in statistics), start=jnp.zeros((), jnp.float32)),
    )
    if teacher:
        theirs = teacher.model
        theirs_BSD, _ = theirs.hidden_states(tokens_BS, positions_BS, segment_ids_BS, present_BS)
        of_teacher = teacher_loss(
            normed_BSD.reshape(-1, config.width),
            head_DW,
            theirs.norm(theirs_BSD).reshape(-1, theirs.model.width),
            whole(theirs.head, jnp.dtype(theirs.model.dtype)),
            ahead.counted[..., 0].reshape(-1),
            teacher.temperature,
        )
        losses = losses._replace(teacher=of_teacher)
    return losses, [one.load_E for one in statistics]


def mean_losses(sums: Losses, counts: LossCounts, config: ModelConfig) -> Losses:
    """Means from sums: a token, or a row and layer. A batch without any such token gives 0, not NaN."""
    tokens = jnp.maximum(counts.tokens, 1)
    routers = max(config.moe_layers + config.mtp_depth, 1)
    return Losses(
        sums.next_token / tokens[0],
        sums.mtp / tokens[1:],
        sums.balance / (jnp.maximum(counts.rows, 1) * routers),
        None if sums.teacher is None else sums.teacher / tokens[0],
    )


def objective(means: Losses, weights: LossWeights, config: ModelConfig) -> Array:
    """The scalar that is minimised. The balance loss is summed over layers and averaged over rows."""
    routers = config.moe_layers + config.mtp_depth
    mtp = means.mtp.sum() / max(config.mtp_depth, 1)
    next_token = means.next_token
    if means.teacher is not None:
        next_token = (1 - weights.teacher) * next_token + weights.teacher * means.teacher
    return next_token + weights.mtp * mtp + weights.balance * routers * means.balance
