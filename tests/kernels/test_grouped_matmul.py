"""The grouped matmul and its gradients against a loop over the groups."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import grouped_matmul_cpu, grouped_matmul_gpu
from dsv3_jax.kernels.grouped_matmul import grouped_matmul

D, F = 5, 7


def _sizes(groups: int, rows: int) -> list[int]:
    return np.bincount(np.random.default_rng(groups).integers(0, groups, rows), minlength=groups).tolist()


CASES = {
    "random": _sizes(6, 100),
    "empty groups, first and last too": [0, 0, 3, 0, 40, 0],
    "all in the first": [33, 0, 0],
    "all in the last": [0, 0, 33],
    "all in the middle": [0, 129, 0],
    "one row": [0, 1, 0],
    "few rows": [0, 3, 0, 5, 0],
    "one row a group": [1] * 9,
    "one group": [50],
    "whole blocks": [128, 256, 128],
    "one more than a block": [129, 1, 127, 65, 9],
    "more groups than rows": _sizes(40, 11),
    "many rows": _sizes(3, 700),
    "high and low blocks, a high one past the end": [35, 0, 0, 1, 0, 0, 0, 0, 0, 0, 27, 31],
}


def _inputs(sizes: list[int], dtype: jnp.dtype):
    random = np.random.default_rng(sum(sizes))
    shapes = ((sum(sizes), D), (len(sizes), D, F), (sum(sizes), F))
    rows, weights, cotangent = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    return rows, weights, jnp.array(sizes, jnp.int32), cotangent


def _loop(rows, weights, sizes, cotangent):
    """Product, and gradients of sum(cotangent * product), in float64."""
    rows, weights, cotangent = (np.asarray(each, np.float64) for each in (rows, weights, cotangent))
    product, of_rows, of_weights = np.zeros(cotangent.shape), np.zeros(rows.shape), np.zeros(weights.shape)
    start = 0
    for group, size in enumerate(np.asarray(sizes)):
        mine = slice(start, start + size)
        product[mine] = rows[mine] @ weights[group]
        of_rows[mine] = cotangent[mine] @ weights[group].T
        of_weights[group] = rows[mine].T @ cotangent[mine]
        start += size
    return product, of_rows, of_weights


@jax.jit
def _all(rows, weights, sizes, cotangent):
    product, backward = jax.vjp(lambda rows, weights: grouped_matmul(rows, weights, sizes), rows, weights)
    return product, *backward(cotangent)


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_product_and_gradients_are_those_of_the_loop(sizes):
    inputs = _inputs(sizes, jnp.float32)
    for found, expected in zip(_all(*inputs), _loop(*inputs), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", [grouped_matmul_cpu, grouped_matmul_gpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", ["empty groups, first and last too", "high and low blocks, a high one past the end"])
def test_the_gradient_of_weights_alone_is_that_of_the_loop(kernels, name):
    rows, weights, sizes, cotangent = _inputs(CASES[name], jnp.float32)
    found = jax.jit(kernels.gradient_of_weights)(rows, cotangent, sizes)
    np.testing.assert_allclose(found, _loop(rows, weights, sizes, cotangent)[2], rtol=1e-5, atol=1e-5)


def test_an_empty_groups_gradient_is_exactly_zero():
    inputs = _inputs(CASES["empty groups, first and last too"], jnp.float32)
    of_weights = np.asarray(_all(*inputs)[2])
    assert [bool(np.any(gradient)) for gradient in of_weights] == [False, False, True, False, True, False]


@pytest.mark.parametrize("name", ["random", "one more than a block"])
def test_bfloat16_is_accumulated_in_float32(name):
    inputs = _inputs(CASES[name], jnp.bfloat16)
    for found, expected in zip(_all(*inputs), _loop(*inputs), strict=True):
        assert found.dtype == jnp.bfloat16
        # One rounding to 8 bits of a float32 sum; a bfloat16 sum over these rows would lose several times more.
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=2**-8)


def test_a_long_bfloat16_sum_is_not_accumulated_in_bfloat16():
    rows = jnp.ones((1024, 1), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda weights: grouped_matmul(rows, weights, jnp.array([1024])).sum()))
    # Sums of ones in bfloat16 stop at 256.
    assert float(gradient(jnp.ones((1, 1, 1), jnp.bfloat16))[0, 0, 0]) == 1024


def test_group_sizes_are_data_not_structure():
    rows, weights, _, cotangent = _inputs([20, 20, 20], jnp.float32)
    compiled = jax.jit(lambda sizes: grouped_matmul(rows, weights, sizes))
    for sizes in ([60, 0, 0], [1, 2, 57], [20, 20, 20]):
        expected, _, _ = _loop(rows, weights, sizes, cotangent)
        np.testing.assert_allclose(compiled(jnp.array(sizes, jnp.int32)), expected, rtol=1e-5, atol=1e-5)
    assert compiled._cache_size() == 1


def test_infinity_in_one_group_stays_there():
    rows, weights, sizes, _ = _inputs([9, 8, 7], jnp.float32)
    product = jax.jit(grouped_matmul)(rows.at[9].set(jnp.inf), weights, sizes)
    finite = np.isfinite(np.asarray(product)).all(axis=1)
    assert finite.tolist() == [True] * 9 + [False] + [True] * 14


def test_no_array_holds_every_row_for_every_group():
    """On a CPU, where XLA's own ragged product multiplies every row by every group's matrix."""
    rows, groups, width, hidden = 96, 50, 8, 12
    inputs = (
        jnp.zeros((rows, width)),
        jnp.zeros((groups, width, hidden)),
        jnp.zeros(groups, jnp.int32),
        jnp.zeros((rows, hidden)),
    )
    inputs = jax.device_put(inputs, jax.devices("cpu")[0])
    text = _all.lower(*inputs).compile().as_text()
    sizes = [np.prod([int(dim) for dim in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) == groups * width * hidden < rows * groups * width
