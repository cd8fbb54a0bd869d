"""The TPU's products of FP8, emulated on a CPU, against numpy; and lowered for the TPUs that have them, on a mesh."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from dsv3_jax.kernels import scaled_gradient_tpu, scaled_matmul, scaled_matmul_tpu
from dsv3_jax.kernels.quantization import Recipe
from sharding.mesh import on_mesh
from tests.kernels.test_float8_linear import _assert_close, _inputs, _layer, _products

CASES = {
    "ragged, empty and of one row": ([0, 150, 1, 0, 128], 9, 200, 264, jnp.float32),
    "one group, all of its rows": ([300], 0, 640, 384, jnp.bfloat16),
}
PRODUCTS = "grouped_product", "grouped_input_gradient", "grouped_weight_gradient"


@pytest.fixture
def layer(monkeypatch):
    """The function of the users, with the TPU's kernels emulated and tiles small enough to need several of each."""
    native = {name: functools.partial(getattr(scaled_matmul_tpu, name), interpret=True) for name in PRODUCTS}
    monkeypatch.setattr(scaled_matmul, "native_kernels", lambda: SimpleNamespace(**native))
    for name, size in {"ROWS": 256, "COLUMNS": 128, "STEP": 256}.items():
        monkeypatch.setattr(scaled_matmul_tpu, name, size)
    for name, size in {"ROWS": 128, "COLUMNS": 256, "STEP": 2}.items():
        monkeypatch.setattr(scaled_gradient_tpu, name, size)
    return jax.jit(lambda *inputs: _layer(Recipe(), False, *inputs))


@pytest.mark.parametrize(("sizes", "rest", "depth", "width", "dtype"), CASES.values(), ids=CASES.keys())
def test_product_and_gradients_are_those_of_numpy(layer, sizes, rest, depth, width, dtype):
    rows, weights, gradient = _inputs(depth, width, sizes, rest)
    gradient *= 2**10  # the oracle has one bound for all scales, and a channel of one row may be below
    wanted = _products(rows, weights, gradient, sizes=sizes)
    found = layer(jnp.array(sizes, jnp.int32), jnp.asarray(rows, dtype), weights, jnp.asarray(gradient, dtype))
    _assert_close(found, wanted, [dtype, dtype, jnp.float32], sizes)


def test_rows_of_no_group_and_numbers_that_are_none_are_felt_where_they_belong(layer):
    sizes = [40, 30]
    rows, weights, gradient = _inputs(128, 128, sizes, rest=0)
    of_weights = layer(jnp.zeros(2, jnp.int32), rows * np.nan, weights, gradient * np.nan)[2]
    np.testing.assert_array_equal(of_weights, 0)
    gradient[45, 3] = np.inf
    inputs = jnp.array(sizes, jnp.int32), rows, weights, gradient
    _, of_rows, of_weights = (np.isnan(each) for each in layer(*inputs))
    assert of_rows[45].all() and not np.delete(of_rows, 45, axis=0).any()
    assert of_weights[1, :, 3].all() and not of_weights[0].any() and not of_weights[1, :, 4:].any()


@pytest.mark.parametrize(("kind", "native"), [("TPU7x", True), ("TPU v6 lite", False), ("TPU v5", False)])
def test_it_is_chosen_and_lowered_for_a_mesh_of_tpus_that_multiply_fp8(kind, native):
    """With the check of what varies over devices on. Elsewhere the grouped matmul multiplies float32."""
    mesh = AbstractMesh((4,), ("expert",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(kind, 2, "tpu"))
    by_device = PartitionSpec("expert")
    step = jax.jit(on_mesh(functools.partial(_layer, Recipe(), False), mesh, (by_device,) * 4, (by_device,) * 3))
    shapes = (4 * 2,), (4 * 2048, 1408), (4 * 2, 1408, 1024), (4 * 2048, 1024)
    types = jnp.int32, jnp.bfloat16, jnp.float32, jnp.bfloat16
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]
    text = step.trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    products = [line for line in calls if re.search(r'"grouped_matmul', line)]
    assert len(products) == 3 and all(("f8E4M3FN" in line) is native for line in products)
    # Rows, gradients and matrices, and both of the former along the tokens.
    assert len([line for line in calls if '"quantized"' in line]) == (5 if native else 0)
