"""Hopper's products of FP8 are chosen and lowered for GPUs, on a mesh; tests/slow emulates them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from dsv3_jax.kernels.quantization import Recipe
from sharding.mesh import on_mesh
from tests.kernels.test_float8_linear import _layer


@pytest.mark.parametrize(
    ("kind", "native"), [("NVIDIA H200", True), ("NVIDIA GH200 480GB", True), ("NVIDIA A100-SXM4-80GB", False)]
)
def test_they_are_chosen_and_lowered_for_a_mesh_of_gpus_that_have_them(kind, native):
    """With the check of what varies over devices on. Elsewhere XLA's ragged product multiplies float32."""
    device = AbstractDevice(kind, 132, "gpu")
    mesh = AbstractMesh((4,), ("expert",), axis_types=(AxisType.Auto,), abstract_device=device)
    by_device = PartitionSpec("expert")
    step = jax.jit(on_mesh(functools.partial(_layer, Recipe(), False), mesh, (by_device,) * 4, (by_device,) * 3))
    shapes = (4 * 2,), (4 * 256, 1408), (4 * 2, 1408, 200), (4 * 256, 200)
    types = jnp.int32, jnp.bfloat16, jnp.float32, jnp.bfloat16
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]
    text = step.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "mosaic_gpu" in line]
    assert len(calls) == (3 if native else 0) and all("f8E4M3FN" in line for line in calls)
