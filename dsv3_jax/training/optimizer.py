"""AdamW with the V3 learning-rate shape and decay of matrices only."""

import jax
import optax

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, Tree, logical_axes
from dsv3_jax.training.schedules import learning_rate


def adamw(config: Config, skeleton: Skeleton) -> optax.GradientTransformation:
    """AdamW, decoupled decay, of gradients already clipped. The router bias is not among its parameters at all."""
    options = config.optimizer
    return optax.adamw(
        lambda step: learning_rate(step, options, config.training.steps),
        b1=options.beta1,
        b2=options.beta2,
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        mask=_decayed(skeleton),
    )


def _decayed(skeleton: Skeleton) -> Tree:
    """True for matrices. A norm gain has one dim besides the layers it is stacked over; decay would pull it to 0."""
    return jax.tree.map(
        lambda axes: len([axis for axis in axes if axis != "layers"]) > 1,
        logical_axes(skeleton),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
