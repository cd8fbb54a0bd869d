"""AdamW with the V3 learning-rate shape and decay of matrices only."""

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import Config
from dsv3_jax.model.functional import Skeleton, Tree, logical_axes
from dsv3_jax.training.schedules import learning_rate


def adamw(config: Config, skeleton: Skeleton) -> optax.GradientTransformation:
    """AdamW, decoupled decay, of gradients already clipped. The router bias is not among its parameters at all."""
    options = config.optimizer
    adam = optax.scale_by_adam(b1=options.beta1, b2=options.beta2, eps=options.epsilon)
    return optax.chain(
        _moments_kept_in(jnp.dtype(config.moments), adam),
        optax.add_decayed_weights(options.weight_decay, _decayed(skeleton)),
        optax.scale_by_learning_rate(lambda step: learning_rate(step, options, config.training.steps)),
    )


def _moments_kept_in(dtype: jnp.dtype, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`adam` with both moments kept in this type; optax itself has a type for the first alone."""
    if dtype == jnp.float32:
        return adam

    def kept(state: optax.ScaleByAdamState, dtype: jnp.dtype) -> optax.ScaleByAdamState:
        return state._replace(mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype))

    def update(gradients: Tree, state: optax.ScaleByAdamState, parameters: Tree | None = None):
        updates, after = adam.update(gradients, kept(state, jnp.dtype(jnp.float32)), parameters)
        return updates, kept(after, dtype)

    return optax.GradientTransformation(lambda parameters: kept(adam.init(parameters), dtype), update)


def _decayed(skeleton: Skeleton) -> Tree:
    """True for matrices. A norm gain has one dim besides the layers it is stacked over; decay would pull it to 0."""
    return jax.tree.map(
        lambda axes: len([axis for axis in axes if axis != "layers"]) > 1,
        logical_axes(skeleton),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
