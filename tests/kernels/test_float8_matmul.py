"""Products with matrices held in FP8: those of the matrices they stand for."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.kernels import float8_matmul_tpu
from dsv3_jax.model.float8 import Float8Blocks, blocks_of


@pytest.mark.parametrize(
    ("rows", "sizes"), [(21, (7, 0, 11)), (16, (0, 0, 16)), (3, (1, 1, 0)), (40, (0, 0, 0)), (300, (150, 3, 147))]
)
def test_the_kernel_multiplies_each_row_with_its_group_s_matrix(rows, sizes):
    draws = np.random.default_rng(0)
    rows_MD = draws.normal(size=(rows, 640)).astype(ml_dtypes.bfloat16)
    codes_EDF = draws.normal(size=(3, 640, 384)).astype(ml_dtypes.float8_e4m3fn)
    scales_EdF = draws.random((3, 5, 384), np.float32)
    made_MF = float8_matmul_tpu.product(
        *map(jnp.asarray, (rows_MD, codes_EDF, scales_EdF, np.array(sizes, np.int32))), interpret=True
    )
    assert made_MF.shape == (rows, 384) and made_MF.dtype == jnp.bfloat16
    values_EDF = (codes_EDF.astype(np.float32) * np.repeat(scales_EdF, 128, axis=1)).astype(ml_dtypes.bfloat16)
    group_m = np.repeat(np.arange(3), sizes)
    own_mD, values_mDF = rows_MD[: len(group_m)].astype(np.float64), values_EDF[group_m].astype(np.float64)
    expected_mF = np.einsum("md,mdf->mf", own_mD, values_mDF)
    np.testing.assert_allclose(np.asarray(made_MF[: len(group_m)], np.float64), expected_mF, rtol=2**-7, atol=0.02)


def test_what_the_kernel_takes():
    assert float8_matmul_tpu.fits(512, 7168, 512)
    assert not float8_matmul_tpu.fits(513, 7168, 512) and not float8_matmul_tpu.fits(8, 7168, 576)


def test_a_value_is_its_code_times_the_scale_of_its_block():
    """Edge blocks that are not whole, and heads of 192 whose blocks of 128 end within a head."""
    axes, shape = ("latent", "heads", "query_key_dim"), (130, 3, 192)
    blocks = blocks_of(axes, shape, None)
    assert blocks == (128, 1, 64)
    draws = np.random.default_rng(0)
    codes = draws.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    # Of the checkpoint's matrix [heads * 192, 130] a scale for each block of 128 x 128.
    grid = draws.random((5, 2), np.float32)
    scales = np.stack([grid[(head * 192 + part * 64) // 128] for head in range(3) for part in range(3)])
    held = Float8Blocks(jnp.asarray(codes), jnp.asarray(scales.T.reshape(2, 3, 3)), blocks)
    matrix = codes.transpose(1, 2, 0).reshape(576, 130).astype(np.float32)
    matrix *= np.repeat(np.repeat(grid, 128, axis=0)[:576], 128, axis=1)[:, :130]
    expected = matrix.astype(ml_dtypes.bfloat16).reshape(3, 192, 130).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.asarray(held.values(jnp.dtype(jnp.bfloat16))), expected)


def test_blocks_end_where_a_device_s_part_does(mesh_with):
    axes = ("experts", "expert_ffn", "expert_width")
    assert blocks_of(axes, (8, 2048, 7168), mesh_with(tensor=8)) == (1, 128, 128)
    assert blocks_of(axes, (8, 192, 7168), mesh_with(tensor=2)) == (1, 32, 128)
    assert blocks_of(("vocabulary", "width"), (512, 256), None) is None
