"""Grouped matmul: rows sorted by group, each group times its own matrix. The cost follows the rows, not the groups."""

from types import ModuleType

import jax
from jax import Array

from dsv3_jax.kernels import grouped_matmul_cpu, grouped_matmul_gpu
from sharding.collectives import spread_alike
from sharding.mesh import platform

# The two functions that differ by platform are the product and its gradients, under one differentiation rule: what is
# saved for the backward pass are the arguments themselves, which a scan over layers does not have to copy.


def grouped_matmul(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    """rows of group e times weights[e].

    Args:
        rows_MD: rows ordered by group; those past the sum of the sizes are no rows, and their results mean nothing.
        weights_EDF: one matrix a group, in the type of the rows.
        group_sizes_E: int32, any of them 0.

    Returns:
        [M, F] in the type of the rows, accumulated in float32.
    """
    return _grouped_matmul(*spread_alike(rows_MD, weights_EDF), group_sizes_E)


def grouped_gradient_of_weights(rows_MD: Array, gradient_MF: Array, group_sizes_E: Array) -> Array:
    """The transpose of the rows of each group times their gradients: [E, D, F] in the type of the rows."""
    inputs = spread_alike(rows_MD, gradient_MF, group_sizes_E)
    return _kernels().gradient_of_weights(*inputs)


def _kernels() -> ModuleType:
    """`product`, `gradients` and `gradient_of_weights` of the platform that is compiled for."""
    if platform() == "tpu":
        from dsv3_jax.kernels import grouped_matmul_tpu  # Pallas takes a second to import

        return grouped_matmul_tpu
    return grouped_matmul_cpu if platform() == "cpu" else grouped_matmul_gpu


@jax.custom_vjp
def _grouped_matmul(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    return _kernels().product(rows_MD, weights_EDF, group_sizes_E)


def _forward(rows_MD, weights_EDF, group_sizes_E):
    return _grouped_matmul(rows_MD, weights_EDF, group_sizes_E), (rows_MD, weights_EDF, group_sizes_E)


def _backward(saved, gradient_MF):
    rows_MD, weights_EDF, group_sizes_E = saved
    return *_kernels().gradients(rows_MD, weights_EDF, group_sizes_E, gradient_MF), None


_grouped_matmul.defvjp(_forward, _backward)
