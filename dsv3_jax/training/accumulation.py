"""What every kind of training step does: gradients of a batch in parts, their norm, and the optimizer's move."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dsv3_jax.model.functional import Tree
from sharding.collectives import spread, summed, variation
from sharding.mesh import TOKEN_AXES


def accumulated(
    loss: Callable[[Tree, Any], tuple[Array, Any]],
    parameters: Tree,
    batch: Any,
    microbatches: int,
    used: Array | None = None,
) -> tuple[Tree, Any]:
    """Gradients of `loss(parameters, part) -> (scalar, more)` and `more`, summed over the parts of a batch.

    Called on every device of a mesh with its rows: `more` is summed over all devices, gradients are of this device's
    pieces. The sum does not depend on the split where every part divides by what the whole batch counts.

    Args:
        batch: a tree of arrays [B, ..]; part i of a device is rows i * B / microbatches and on.
        used: int32, the same on all devices: parts after so many hold nothing, and cost nothing. By default none does.
    """
    # From here on every device has parameters of its own; what they were copies of gets the sum of their gradients.
    own = jax.tree.map(lambda leaf: spread(leaf, TOKEN_AXES), parameters)

    def of_part(part: Any) -> tuple[Tree, Any]:
        return jax.grad(loss, has_aux=True)(own, part)

    if microbatches == 1:
        gradients, more = of_part(batch)
    else:
        parts = jax.tree.map(lambda rows: rows.reshape(microbatches, -1, *rows.shape[1:]), batch)
        shapes = jax.eval_shape(of_part, jax.tree.map(lambda rows: rows[0], parts))[1]
        nothing = jax.tree.map(lambda leaf: spread(jnp.zeros(leaf.shape, leaf.dtype), TOKEN_AXES), shapes)
        start = jax.tree.map(jnp.zeros_like, own), nothing

        def add(total: tuple[Tree, Any], part: Any) -> tuple[Tree, Any]:
            return jax.tree.map(jnp.add, total, of_part(part))

        if used is None:
            gradients, more = jax.lax.scan(lambda total, part: (add(total, part), None), start, parts)[0]
        else:
            gradients, more = jax.lax.fori_loop(
                0, used, lambda index, total: add(total, jax.tree.map(lambda rows: rows[index], parts)), start
            )
    more = jax.tree.map(lambda leaf: summed(leaf, TOKEN_AXES), more)
    return jax.tree.map(_sum_of_copies, gradients, parameters), more


def global_norm(gradients: Tree) -> Array:
    """Square root of the sum of all squares, over the pieces of all devices."""
    squares: dict[tuple[str, ...], list[Array]] = defaultdict(list)
    for gradient in jax.tree.leaves(gradients):
        squares[variation(gradient)].append(jnp.sum(gradient * gradient))
    return jnp.sqrt(sum((summed(jnp.stack(parts).sum(), axes) for axes, parts in squares.items()), start=jnp.zeros(())))


def clipped(gradients: Tree, norm: Array, most: float) -> Tree:
    """Scaled down to a norm of `most` where theirs is larger."""
    # A factor, not optax.clip_by_global_norm: that divides, and XLA writes the quotients to memory first.
    return optax.tree.scale(jnp.minimum(1.0, most / norm), gradients)


def stepped(optimizer: optax.GradientTransformation, gradients: Tree, state: Any, parameters: Tree) -> tuple[Tree, Any]:
    """Parameters and optimizer state after one update."""
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state


def chosen(finite: Array, after: Any, before: Any) -> Any:
    """The state after a step, or before it: one that is not finite leaves no trace, and the run stops with a state that
    is still good. Chosen number by number, not by a branch: a branch's result is a second state in memory."""
    return jax.tree.map(lambda one, other: jnp.where(finite, one, other), after, before)


def _sum_of_copies(gradient: Array, parameter: Array) -> Array:
    """The gradient of a parameter, from those that the devices that hold it found each for its own copy."""
    return summed(gradient, [axis for axis in variation(gradient) if axis not in variation(parameter)])
