"""Grouped matmul on GPUs: XLA's ragged product."""

import jax
import jax.numpy as jnp
from jax import Array


def product(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if rows_MD.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.ragged_dot(
        rows_MD, weights_EDF, group_sizes_E, precision=precision, preferred_element_type=rows_MD.dtype
    )


def gradients(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array, gradient_MF: Array):
    _, backward = jax.vjp(lambda rows, weights: product(rows, weights, group_sizes_E), rows_MD, weights_EDF)
    return backward(gradient_MF)
