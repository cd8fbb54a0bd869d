"""Learning the probabilities of a teacher: forward KL on the tokens that are learnt (Hinton et al. 2015, section 2)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.convert.opening import OpenedModel
from dsv3_jax.data.tokenizer import tokenizer_from
from dsv3_jax.loading import load_opened, tokenizer_of
from dsv3_jax.model.functional import Skeleton, Tree, parameter_specs, skeleton_of, take_apart, to_run
from dsv3_jax.model.layers import contract
from dsv3_jax.training.cross_entropy import chunked_loss
from sharding.collectives import largest, summed
from sharding.mesh import shardings
from sharding.rules import TENSOR_AXES


class Teacher(NamedTuple):
    """A model that only runs."""

    skeleton: Skeleton
    trees: tuple[Tree, Tree]
    """Parameters and router bias, on the mesh; or ShapeDtypeStructs of them."""


def open_teacher(opened: OpenedModel, config: Config, tokenizer: str | None, mesh: Mesh) -> Teacher:
    """The teacher of a run with this tokenizer.json, on its mesh.

    Raises:
        ConfigError: its tokens are not those of the run.
    """
    theirs, rows = tokenizer_of(opened), opened.config.model.vocabulary
    if theirs is None or tokenizer is None:
        raise ConfigError(f"loss.teacher={config.loss.teacher} has no tokenizer.json to tell that its tokens are ours")
    if theirs.to_str() != tokenizer_from(tokenizer, "the tokenizer", config.model.vocabulary).to_str():
        raise ConfigError(
            f"loss.teacher={config.loss.teacher} has another tokenizer than this run: a teacher's probabilities are of "
            f"its own tokens; use data.tokenizer={config.loss.teacher}/tokenizer.json"
        )
    if rows != config.model.vocabulary:
        raise ConfigError(
            f"loss.teacher={config.loss.teacher} has model.vocabulary={rows}, this run {config.model.vocabulary}: "
            "they must be equal"
        )
    model, teacher_config, _ = load_opened(opened, mesh=mesh)
    skeleton = to_run(skeleton_of(teacher_config.model))
    return Teacher(skeleton, jax.device_put(take_apart(model), shardings(mesh, parameter_specs(skeleton, mesh))))


def teacher_loss(
    hidden_ND: Array, head_DW: Array, teacher_ND: Array, teacher_head_DW: Array, counted_N: Array, temperature: float
) -> Array:
    """Sum over the counted tokens of temperature^2 * KL(teacher || student), float32 scalar, in nats.

    Both have logits hidden @ head, divided by the temperature; with its square in front, gradients keep their size
    whatever it is. The D of the two may differ. Differentiated in `hidden_ND` and `head_DW` alone.

    Args:
        hidden_ND, teacher_ND: normed hidden states.
        head_DW, teacher_head_DW: where the vocabulary is divided over devices, this device's part of both.
        counted_N: bool.
    """
    shared = jax.lax.stop_gradient((teacher_head_DW, jnp.float32(temperature)))
    return chunked_loss(_chunk_loss, hidden_ND, head_DW, shared, (jax.lax.stop_gradient(teacher_ND), counted_N))


def _chunk_loss(hidden_ND: Array, head_DW: Array, shared: Any, rows: Any) -> tuple[Array, Array]:
    teacher_ND, counted_N = rows
    teacher_head_DW, temperature = shared
    student_NW = _log_probabilities(hidden_ND, head_DW, temperature)
    teacher_NW = _log_probabilities(teacher_ND, teacher_head_DW, temperature)
    probability_NW = jnp.exp(teacher_NW)
    divergence_N = summed((probability_NW * (teacher_NW - student_NW)).sum(axis=-1), TENSOR_AXES)
    loss = temperature**2 * jnp.sum(jnp.where(counted_N, divergence_N, 0.0))
    # One power of the temperature is left: the logits were divided by it.
    return loss, temperature * counted_N[:, None] * (jnp.exp(student_NW) - probability_NW)


def _log_probabilities(hidden_ND: Array, head_DW: Array, temperature: Array) -> Array:
    logits_NW = contract("nd,dw->nw", hidden_ND, head_DW, hidden_ND.dtype, jnp.dtype(jnp.float32)) / temperature
    shifted_NW = logits_NW - largest(logits_NW.max(axis=-1, keepdims=True), TENSOR_AXES)
    return shifted_NW - jnp.log(summed(jnp.exp(shifted_NW).sum(axis=-1, keepdims=True), TENSOR_AXES))
