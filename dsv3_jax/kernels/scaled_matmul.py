"""The three products of a linear layer in FP8, of rows sorted by group and a matrix a group.

A partial sum over each 128 of what is summed over is multiplied by the scales of its two tiles, then added up in
float32 (V3 section 3.3.2). A dense layer is one group. Where a device multiplies FP8, kernels of ours let it; elsewhere
the operands are first multiplied by their scales, the same but for float32's rounding.
"""

import re
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

from dsv3_jax.kernels.grouped_matmul import grouped_gradient_of_weights, grouped_matmul
from dsv3_jax.kernels.quantization import FLOAT8_TPU, Scaled, blocks_of, columns_of, in_whole_tiles, rows_of
from sharding.mesh import device_kind, platform


def multiplies_float8(kind: str) -> bool:
    """Whether devices of this kind (`device_kind`) multiply FP8, by the kernels here.

    XLA compiles products of float8_e4m3fn for any device, and where there are none in hardware lets it multiply another
    type, unasked. So it takes a name here: TPUs of the seventh generation; GPUs of Hopper, whose kernel needs theirs.
    """
    return kind == FLOAT8_TPU or re.match(r"NVIDIA (GH200|H\d+)\b", kind) is not None


def native_kernels() -> ModuleType | None:
    """The three functions for the devices that are compiled for; None: they multiply no FP8."""
    if not multiplies_float8(device_kind()):
        return None
    if platform() == "tpu":
        from dsv3_jax.kernels import scaled_matmul_tpu  # Pallas takes a second to import

        return scaled_matmul_tpu
    from dsv3_jax.kernels import scaled_matmul_gpu

    return scaled_matmul_gpu


def grouped_product(rows: Scaled, weights: Scaled, group_sizes_E: Array, dtype: jnp.dtype) -> Array:
    """rows of group e times weights[e]: [M, F] in `dtype`.

    Args:
        rows: codes [M, D], scales [M, ceil(D / 128)]; those past the sum of the sizes are no rows, and their results
            mean nothing.
        weights: codes [E, D, F], scales [E, ceil(D / 128), ceil(F / 128)].
        group_sizes_E: int32, any of them 0.
    """
    if native := native_kernels():
        return native.grouped_product(rows, weights, group_sizes_E, dtype)
    return _multiplied(rows_of(rows), blocks_of(weights), group_sizes_E).astype(dtype)


def grouped_input_gradient(gradient: Scaled, weights: Scaled, group_sizes_E: Array, dtype: jnp.dtype) -> Array:
    """Gradient rows of group e times the transpose of weights[e]: [M, D] in `dtype`.

    Args:
        gradient: codes [M, F], scales [M, ceil(F / 128)].
        weights, group_sizes_E: as in `grouped_product`.
    """
    if native := native_kernels():
        return native.grouped_input_gradient(gradient, weights, group_sizes_E, dtype)
    return _multiplied(rows_of(gradient), blocks_of(weights).swapaxes(1, 2), group_sizes_E).astype(dtype)


def grouped_weight_gradient(rows: Scaled, gradient: Scaled, group_sizes_E: Array) -> Array:
    """The transpose of the rows of group e times their gradients: float32 [E, D, F].

    Args:
        rows: of `quantization.quantized_columns`: codes [128 T, D], scales [T, D], one for a channel's numbers in a
            tile of 128 rows of one group; 0 where a tile has no row.
        gradient: codes [128 T, F], scales [T, F].
        group_sizes_E: as in `grouped_product`.
    """
    if native := native_kernels():
        return native.grouped_weight_gradient(rows, gradient, group_sizes_E)
    left_RD, right_RF = columns_of(rows), columns_of(gradient)
    if len(group_sizes_E) > 1:
        return grouped_gradient_of_weights(left_RD, right_RF, in_whole_tiles(group_sizes_E))
    return jnp.matmul(left_RD.T, right_RF, precision=jax.lax.Precision.HIGHEST)[None]


def _multiplied(rows_MD: Array, weights_EDF: Array, group_sizes_E: Array) -> Array:
    if len(weights_EDF) > 1:
        return grouped_matmul(rows_MD, weights_EDF, group_sizes_E)
    return jnp.matmul(rows_MD, weights_EDF[0], precision=jax.lax.Precision.HIGHEST)
