"""Hopper's products of FP8, emulated on a CPU thread by thread, against numpy."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

# Not public as of jax 0.10.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels import scaled_matmul, scaled_matmul_gpu
from dsv3_jax.kernels.quantization import Recipe
from tests.kernels.test_float8_linear import _assert_close, _inputs, _layer, _products
from tests.kernels.test_scaled_matmul_tpu import PRODUCTS


def _emulated_product(left, right):
    """In place of the tensor cores, whose operands the emulation cannot turn around."""
    return left[...].astype(jnp.float32) @ right[...].astype(jnp.float32).T


@pytest.fixture
def layer(monkeypatch):
    """The function of the users with the kernels emulated; layouts of registers are left out."""
    emulated = InterpretGPUParams()
    native = {name: functools.partial(getattr(scaled_matmul_gpu, name), interpret=emulated) for name in PRODUCTS}
    monkeypatch.setattr(scaled_matmul, "native_kernels", lambda: SimpleNamespace(**native))
    monkeypatch.setattr(scaled_matmul_gpu, "_multiplied", _emulated_product)
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, _: x)
    return jax.jit(lambda *inputs: _layer(Recipe(), False, *inputs))


@pytest.mark.parametrize(
    ("sizes", "rest", "depth", "width"),
    [([0, 130, 1], 9, 140, 100), ([70], 0, 128, 256)],
    ids=["ragged, empty and of one row", "one group, all of its rows"],
)
def test_product_and_gradients_are_those_of_numpy(layer, sizes, rest, depth, width):
    rows, weights, gradient = _inputs(depth, width, sizes, rest)
    gradient *= 2**10  # the oracle has one bound for all scales, and a channel of one row may be below
    wanted = _products(rows, weights, gradient, sizes=sizes)
    found = layer(jnp.array(sizes, jnp.int32), rows, weights, gradient)
    _assert_close(found, wanted, [jnp.float32] * 3, sizes)
