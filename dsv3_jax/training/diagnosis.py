"""Which tensor went wrong first, asked once when a step was not finite."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, put_together
from dsv3_jax.model.layers import scan_stack
from dsv3_jax.model.rope import rotation
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.schedules import loss_weights
from dsv3_jax.training.step import TrainState, accumulated_gradients


def first_bad_tensor(state: TrainState, batch: Batch, config: Config, skeleton: Skeleton) -> str:
    """Name of the first tensor with a NaN or infinity, in the order in which a step computes them.

    Parameters, router biases, the residual stream after each block, the losses, then the gradients.
    """
    for name, tensor in _tensors(state, batch, config, skeleton):
        if not bool(jnp.isfinite(tensor).all()):
            kind = "NaN" if bool(jnp.isnan(tensor).any()) else "infinity"
            return f"{name} has a {kind}"
    return "the sum of squared gradients overflows float32, though each gradient is finite"


def _tensors(state: TrainState, batch: Batch, config: Config, skeleton: Skeleton) -> Iterator[tuple[str, Array]]:
    yield from _named("parameter", state.parameters)
    yield from _named("router bias", state.router_bias)
    finite_blocks = jax.jit(lambda state, batch: _finite_blocks(state, batch, config, skeleton))
    for index, finite in enumerate(finite_blocks(state, batch)):
        where = "the embedding" if index == 0 else f"block {index - 1}"
        yield f"the residual stream after {where}", jnp.where(finite, 0.0, jnp.nan)
    weights = loss_weights(state.step, config.loss, config.training.steps)
    compute = jax.jit(lambda state, batch: accumulated_gradients(state, batch, weights, config, skeleton))
    losses, _, gradients = compute(state, batch)
    yield "the next-token loss", losses.next_token
    yield "the MTP loss", losses.mtp
    yield "the balance loss", losses.balance
    yield from _named("the gradient of", gradients)


def _finite_blocks(state: TrainState, batch: Batch, config: Config, skeleton: Skeleton) -> Array:
    """bool [L + 1]: whether the residual stream is finite after the embedding and after each block."""
    model = put_together(skeleton, state.parameters, state.router_bias)
    segment_ids_BS = batch.segment_ids[:, :-1] if config.data.isolate_documents else None
    present_BS = batch.segment_ids[:, :-1] > 0
    by = rotation(config.model, batch.positions[:, :-1])

    def body(block, x_BSD: Array, _):
        x_BSD, _, _ = block(x_BSD, by, segment_ids_BS, present_BS)
        return x_BSD, jnp.isfinite(x_BSD).all()

    x_BSD = model.embed(batch.tokens[:, :-1])
    finite = [jnp.isfinite(x_BSD).all()[None]]
    for blocks in model.stacks():
        x_BSD, of_blocks = scan_stack(blocks, body, x_BSD)
        finite.append(of_blocks)
    return jnp.concatenate(finite)


def _named(what: str, tree: Any) -> Iterator[tuple[str, Array]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield f"{what} {jax.tree_util.keystr(path, simple=True, separator='.')}", leaf
