"""SwiGLU of the experts' rows, each times the weight of its expert, with its gradient written out."""

import jax
import jax.numpy as jnp
from jax import Array

from sharding.mesh import platform


@jax.custom_vjp
def weighted_swiglu(gate_and_up_MG: Array, weights_M: Array) -> Array:
    """weight * silu(gate) * up: [M, F] in the type of the rows, [M, 2F] that hold the gates first.

    The product with `down` is linear: weighing what goes into it weighs the answer, at F numbers a row, not D.
    """
    gate, up = jnp.split(gate_and_up_MG, 2, axis=1)
    return (jax.nn.silu(gate) * up * weights_M[:, None]).astype(gate_and_up_MG.dtype)


def _backward(saved: tuple[Array, Array], gradient_MF: Array) -> tuple[Array, Array]:
    gate_and_up_MG, weights_M = saved
    # In float32, and in one pass over [M, 2F]. XLA:CPU takes several times as long to join halves as to choose between
    # them along a dim of 2; a TPU keeps such a dim where it has its rows, and would lay everything out anew.
    of_both = _of_both_chosen if platform() == "cpu" else _of_both_joined
    gate, up = (half.astype(jnp.float32) for half in jnp.split(gate_and_up_MG, 2, axis=1))
    gradient = gradient_MF.astype(jnp.float32)
    of_weights_M = jnp.sum(gradient * jax.nn.silu(gate) * up, axis=1).astype(weights_M.dtype)
    return of_both(gate, up, gradient * weights_M[:, None]).astype(gate_and_up_MG.dtype), of_weights_M


def _of_both_chosen(gate: Array, up: Array, gradient: Array) -> Array:
    gate, up, gradient = gate[:, None], up[:, None], gradient[:, None]
    is_gate = jnp.arange(2)[:, None] == 0
    return (jnp.where(is_gate, up * _silu_slope(gate), jax.nn.silu(gate)) * gradient).reshape(gate.shape[0], -1)


def _of_both_joined(gate: Array, up: Array, gradient: Array) -> Array:
    return jnp.concatenate([up * _silu_slope(gate) * gradient, jax.nn.silu(gate) * gradient], axis=1)


def _silu_slope(x: Array) -> Array:
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


weighted_swiglu.defvjp(lambda *arguments: (weighted_swiglu(*arguments), arguments), _backward)
