"""Which tensor went wrong first, asked once when a step was not finite."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, parameter_specs, put_together
from dsv3_jax.model.layers import scan_stack
from dsv3_jax.model.rope import rotation
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.schedules import loss_weights
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import accumulated_gradients
from sharding.collectives import largest, variation
from sharding.context import context_part
from sharding.mesh import on_mesh, row_spec


def first_bad_tensor(state: TrainState, batch: Batch, config: Config, skeleton: Skeleton, mesh: Mesh) -> str:
    """Name of the first tensor with a NaN or infinity, in the order in which a step computes them.

    Parameters, router biases, the residual stream after each block, the losses, then the gradients.
    """
    for name, tensor in _tensors(state, batch, config, skeleton, mesh):
        if not bool(jnp.isfinite(tensor).all()):
            kind = "NaN" if bool(jnp.isnan(tensor).any()) else "infinity"
            return f"{name} has a {kind}"
    return "the sum of squared gradients overflows float32, though each gradient is finite"


def _tensors(
    state: TrainState, batch: Batch, config: Config, skeleton: Skeleton, mesh: Mesh
) -> Iterator[tuple[str, Array]]:
    yield from _named("parameter", state.parameters)
    yield from _named("router bias", state.router_bias)
    # The optimizer's state takes no part.
    state = state._replace(optimizer=())
    parameters, router_bias = parameter_specs(skeleton, mesh)
    specs = TrainState(PartitionSpec(), parameters, router_bias, ()), row_spec(mesh)
    finite_blocks = jax.jit(
        on_mesh(lambda state, batch: _finite_blocks(state, batch, config, skeleton), mesh, specs, PartitionSpec())
    )
    for index, finite in enumerate(finite_blocks(state, batch)):
        where = "the embedding" if index == 0 else f"block {index - 1}"
        yield f"the residual stream after {where}", jnp.where(finite, 0.0, jnp.nan)

    def compute(state: TrainState, batch: Batch) -> Any:
        weights = loss_weights(state.step, config.loss, config.training.steps)
        losses, _, gradients = accumulated_gradients(state, batch, weights, config, skeleton)
        return losses, gradients

    losses, gradients = jax.jit(on_mesh(compute, mesh, specs, (PartitionSpec(), parameters)))(state, batch)
    yield "the next-token loss", losses.next_token
    yield "the MTP loss", losses.mtp
    yield "the balance loss", losses.balance
    yield from _named("the gradient of", gradients)


def _finite_blocks(state: TrainState, batch: Batch, config: Config, skeleton: Skeleton) -> Array:
    """bool [L + 1]: whether the residual stream is finite after the embedding and after each block."""
    model = put_together(skeleton, state.parameters, state.router_bias)
    tokens_BS, segment_ids_BS, positions_BS = (context_part(rows[:, :-1]) for rows in batch[:3])
    present_BS = segment_ids_BS > 0
    isolated_BS = segment_ids_BS if config.data.isolated else None
    by = rotation(config.model, positions_BS)

    def body(block, x_BSD: Array, _):
        x_BSD, _, _ = block(x_BSD, by, isolated_BS, present_BS)
        return x_BSD, _all_finite(x_BSD)

    x_BSD = model.embed(tokens_BS)
    finite = [_all_finite(x_BSD)[None]]
    for blocks in model.stacks():
        x_BSD, of_blocks = scan_stack(blocks, body, x_BSD)
        finite.append(of_blocks)
    return jnp.concatenate(finite)


def _all_finite(x: Array) -> Array:
    """bool, over the parts of all devices."""
    bad = jnp.any(~jnp.isfinite(x)).astype(jnp.int32)
    return largest(bad, variation(bad)) == 0


def _named(what: str, tree: Any) -> Iterator[tuple[str, Array]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield f"{what} {jax.tree_util.keystr(path, simple=True, separator='.')}", leaf
