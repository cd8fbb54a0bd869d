"""Grouped matmul: rows sorted by group, each group times its own matrix. The cost follows the rows, not the groups."""

import math
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
        weights_EDF: one matrix a group, in the type of the rows; in place of F there may be several dims.
        group_sizes_E: int32, any of them 0.

    Returns:
        [M, F] in the type of the rows, accumulated in float32. Differentiable in rows and weights; an empty group's
        weight gradient is 0.
    """
    return _grouped_matmul(*spread_alike(rows_MD, weights_EDF), group_sizes_E)


def _kernels() -> ModuleType:
    """`product` and `gradients` of the platform that is compiled for."""
    if platform() == "tpu":
        from dsv3_jax.kernels import grouped_matmul_tpu  # Pallas takes a second to import

        return grouped_matmul_tpu
    return grouped_matmul_cpu if platform() == "cpu" else grouped_matmul_gpu


@jax.custom_vjp
def _grouped_matmul(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    product_MF = _kernels().product(rows_MD, _flat(weights_EDF), group_sizes_E)
    return product_MF.reshape(rows_MD.shape[0], *weights_EDF.shape[2:])


def _forward(rows_MD, weights_EDF, group_sizes_E):
    return _grouped_matmul(rows_MD, weights_EDF, group_sizes_E), (rows_MD, weights_EDF, group_sizes_E)


def _backward(saved, gradient):
    rows_MD, weights_EDF, group_sizes_E = saved
    gradient_MF = gradient.reshape(rows_MD.shape[0], -1)
    of_rows_MD, of_weights_EDF = _kernels().gradients(rows_MD, _flat(weights_EDF), group_sizes_E, gradient_MF)
    return of_rows_MD, of_weights_EDF.reshape(weights_EDF.shape), None


_grouped_matmul.defvjp(_forward, _backward)


def _flat(weights_EDF: Array) -> Array:
    return weights_EDF.reshape(*weights_EDF.shape[:2], math.prod(weights_EDF.shape[2:]))
