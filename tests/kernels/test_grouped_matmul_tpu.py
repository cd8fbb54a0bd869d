"""The TPU's grouped matmul, emulated on a CPU, against the loop over the groups; and lowered for TPUs on a mesh."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from dsv3_jax.kernels import grouped_matmul_tpu, grouped_rows
from dsv3_jax.kernels.grouped_matmul import grouped_gradient_of_weights, grouped_matmul
from sharding.mesh import on_mesh
from tests.kernels.test_grouped_matmul import CASES, _inputs, _loop


def _gradients_too(rows, weights, sizes, cotangent):
    product, backward = jax.vjp(lambda rows, weights: grouped_matmul(rows, weights, sizes), rows, weights)
    return product, *backward(cotangent)


@pytest.fixture
def emulated(monkeypatch):
    """The function of the users, with the TPU's kernels emulated and tiles small enough to need several of each."""
    kernels = SimpleNamespace(
        product=functools.partial(grouped_matmul_tpu.product, interpret=True),
        gradients=functools.partial(grouped_matmul_tpu.gradients, interpret=True),
        gradient_of_weights=functools.partial(grouped_matmul_tpu.gradient_of_weights, interpret=True),
    )
    monkeypatch.setattr("dsv3_jax.kernels.grouped_matmul._kernels", lambda: kernels)
    monkeypatch.setattr(grouped_rows, "PIECE", 128)
    for name, size in {"ROWS": 256, "COLUMNS": 128, "STEP": 256}.items():
        monkeypatch.setattr(grouped_matmul_tpu, name, size)
    return jax.jit(lambda *inputs: _gradients_too(*inputs))  # a function of its own, for a cache of its own


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_product_and_gradients_are_those_of_the_loop(emulated, sizes):
    inputs = _inputs(sizes, jnp.float32)
    for found, expected in zip(emulated(*inputs), _loop(*inputs), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_weights_alone_is_that_of_the_loop(emulated):
    rows, weights, sizes, cotangent = _inputs(CASES["one more than a block"], jnp.float32)
    found = jax.jit(grouped_gradient_of_weights)(rows, cotangent, sizes)
    np.testing.assert_allclose(found, _loop(rows, weights, sizes, cotangent)[2], rtol=1e-5, atol=1e-5)


# Widths of three steps and two columns, of which the last is not whole in either.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 2**-8)])
def test_garbage_past_the_last_group_is_felt_by_no_one(emulated, dtype, tolerance):
    sizes, depth, width = [300, 0, 1, 227, 256, 0], 641, 200
    count, random = sum(sizes), np.random.default_rng(0)
    shapes = (count + 400, depth), (len(sizes), depth, width), (count + 400, width)
    rows, weights, cotangent = (random.normal(size=shape) for shape in shapes)
    rows[count:], cotangent[count:] = np.nan, np.nan
    inputs = (
        *(jnp.asarray(x, dtype) for x in (rows, weights)),
        jnp.array(sizes, jnp.int32),
        jnp.asarray(cotangent, dtype),
    )
    product, of_rows, of_weights = emulated(*inputs)
    found = product[:count], of_rows[:count], of_weights
    inputs = inputs[0][:count], inputs[1], sizes, inputs[3][:count]
    for each, expected in zip(found, _loop(*inputs), strict=True):
        assert each.dtype == dtype
        # One rounding of a float32 sum.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(each, np.float64), expected, rtol=tolerance, atol=tolerance * scale / 10)
    assert [bool(np.any(gradient)) for gradient in of_weights] == [True, False, True, True, True, False]


def test_rows_of_no_group_at_all(emulated):
    rows, weights, _, cotangent = _inputs([33, 0, 0], jnp.float32)
    of_weights = emulated(rows * jnp.nan, weights, jnp.zeros(3, jnp.int32), cotangent * jnp.nan)[2]
    np.testing.assert_array_equal(of_weights, 0)


def test_tiles_past_the_last_group_are_not_visited():
    for sizes in ([0, 0, 0], [1000, 24, 0], [1000, 30, 0], [1, 1, 1], [4096, 0, 0]):
        for of_empty in (0, 1):
            visits, number = grouped_rows.visits_of(jnp.array(sizes), 512, 8, of_empty)
            stops = np.cumsum(sizes)
            expected = [
                (group, tile)
                for group, (stop, size) in enumerate(zip(stops, sizes, strict=True))
                for tile in range(8)
                if max(stop - size, tile * 512) < min(stop, (tile + 1) * 512)
            ]
            found = list(zip(visits.group_V.tolist(), visits.tile_V.tolist(), strict=True))[: int(number)]
            assert [pair for pair in found if sizes[pair[0]]] == expected
            assert len(found) == max(len(expected) + of_empty * sizes.count(0), 1)


def test_it_is_chosen_and_lowered_for_a_mesh_of_tpus():
    """With the check of what varies over devices on. Emulation does not pass it: jax's own loop over the grid fails."""
    mesh = AbstractMesh(
        (4,), ("expert",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice("TPU v5p", 2, "tpu")
    )
    by_device = PartitionSpec("expert")
    step = jax.jit(on_mesh(_gradients_too, mesh, (by_device,) * 4, (by_device,) * 3))
    shapes = (4 * 2048, 1408), (4 * 2, 1408, 1024), (4 * 2,), (4 * 2048, 1024)
    for dtype in (jnp.bfloat16, jnp.float32):
        inputs = [jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else dtype) for shape in shapes]
        text = step.trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == 3
