"""Rows sorted by group times matrices held in FP8: on TPUs a few rows by a kernel that reads the codes themselves."""

from jax import Array

from dsv3_jax.kernels.grouped_matmul import grouped_matmul
from dsv3_jax.model.float8 import BLOCK, Float8Blocks
from sharding.mesh import platform


def float8_matmul(rows_MD: Array, weights: Float8Blocks, group_sizes_E: Array) -> Array:
    """`grouped_matmul` with what the blocks [E, D, ..] are worth in the type of the rows; [M, F] of F flattened."""
    groups, depth, *columns = weights.codes.shape
    if platform() == "tpu":
        from dsv3_jax.kernels import float8_matmul_tpu  # Pallas takes a second to import

        codes_EDF = weights.codes.reshape(groups, depth, -1)
        if weights.blocks[-1 - len(columns)] == BLOCK and float8_matmul_tpu.fits(len(rows_MD), *codes_EDF.shape[1:]):
            scales_EdF = weights.scales_from_dim(2).reshape(groups, depth // BLOCK, -1)
            return float8_matmul_tpu.product(rows_MD, codes_EDF, scales_EdF, group_sizes_E)
    return grouped_matmul(rows_MD, weights.values(rows_MD.dtype).reshape(groups, depth, -1), group_sizes_E)
