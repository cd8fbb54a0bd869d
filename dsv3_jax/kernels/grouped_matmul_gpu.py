"""Grouped matmul on GPUs: XLA's ragged product."""

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import spread_like


def product(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if rows_MD.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.ragged_dot(
        rows_MD, weights_EDF, group_sizes_E, precision=precision, preferred_element_type=rows_MD.dtype
    )


def gradients(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array, gradient_MF: Array):
    _, backward = jax.vjp(lambda rows, weights: product(rows, weights, group_sizes_E), rows_MD, weights_EDF)
    return backward(gradient_MF)


def gradient_of_weights(rows_MD: Array, gradient_MF: Array, group_sizes_E: Array) -> Array:
    shape = group_sizes_E.shape[0], rows_MD.shape[1], gradient_MF.shape[1]
    matrices = spread_like(jnp.zeros(shape, rows_MD.dtype), rows_MD)
    return gradients(rows_MD, matrices, group_sizes_E, gradient_MF)[1]
