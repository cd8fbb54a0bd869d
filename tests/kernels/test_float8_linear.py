"""FP8 layers against numpy: every operand quantised tile by tile, partial sums block by block of 128, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.float8_linear import product, product_of_swiglu
from dsv3_jax.kernels.quantization import Recipe, quantized_blocks
from dsv3_jax.kernels.weighted_swiglu import weighted_swiglu
from sharding.encoded import Encoded
from tests.reference import float8 as reference

DEPTH, WIDTH = 200, 264
SIZES = [0, 150, 7, 128]
ROWS = sum(SIZES) + 9
"""Nine rows are no rows."""
POWERS = Recipe("power_of_two")


def _inputs(depth: int, width: int, sizes: list[int] = SIZES, rest: int = 9):
    random = np.random.default_rng(depth)
    # Numbers of a bfloat16 model: channels and tokens of very different sizes, where one scale for all would lose most.
    count = sum(sizes) + rest
    rows = random.standard_normal((count, depth)) * 10.0 ** random.uniform(-2, 2, (count, 1))
    gradient = random.standard_normal((count, width)) * 10.0 ** random.uniform(-3, 0, (count, 1))
    weights = (random.standard_normal((len(sizes), depth, width)) * 0.1).astype(np.float32)
    rows, gradient = (np.asarray(x, jnp.bfloat16).astype(np.float32) for x in (rows, gradient))
    rows[sum(sizes) :] = np.nan
    return rows, weights, gradient


def _groups(sizes: list[int]):
    starts = np.cumsum(sizes) - sizes
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _products(rows, weights, gradient, *, power=False, gradient_power=False, columns_from=None, sizes=SIZES):
    """The product, and the gradients of rows and weights."""
    columns_from = reference.as_rows(rows, power) if columns_from is None else columns_from
    of_rows, wide = reference.as_rows(rows, power), reference.as_rows(gradient, gradient_power)
    came_in = wide if gradient_power and not power else gradient
    left, right = (reference.as_columns(x.astype(np.float32), sizes, power) for x in (columns_from, came_in))
    out, of_input, of_weights = np.zeros(gradient.shape), np.zeros(rows.shape), np.zeros(weights.shape)
    for group, mine in enumerate(_groups(sizes)):
        blocks = reference.as_blocks(weights[group], power)
        for k in reference.cut(rows.shape[1]):
            out[mine] += of_rows[mine, k] @ blocks[k]
        for k in reference.cut(gradient.shape[1]):
            of_input[mine] += wide[mine, k] @ blocks[:, k].T
        of_weights[group] = left[mine].T @ right[mine]
    return out, of_input, of_weights


@functools.partial(jax.jit, static_argnums=(0, 1))
def _found(recipe, keep_values, rows, weights, gradient):
    return _layer(recipe, keep_values, jnp.array(SIZES, jnp.int32), rows, weights, gradient)


def _layer(recipe, keep_values, sizes, rows, weights, gradient):
    """The product, and the gradients of rows and weights."""

    def layer(rows, weights):
        matrices = Encoded(quantized_blocks(jax.lax.stop_gradient(weights), recipe), weights)
        return product(rows, matrices, sizes, recipe, keep_values=keep_values)

    out, transpose = jax.vjp(layer, rows, weights)
    return out, *transpose(gradient)


def _assert_close(found, wanted, types, sizes=SIZES):
    for one, other, dtype in zip(found, wanted, types, strict=True):
        assert one.dtype == dtype
        one = np.asarray(one, np.float64)
        if one.ndim == 2:  # what is no row means nothing
            one, other = one[: sum(sizes)], other[: sum(sizes)]
        # A sum in float32, then one rounding to the type.
        step = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-22
        np.testing.assert_allclose(one, other, rtol=step, atol=2e-6 * np.abs(other).max(axis=-1, keepdims=True).max())


@pytest.mark.parametrize(
    ("recipe", "keep_values"), [(Recipe(), False), (POWERS, False), (Recipe(), True)], ids=["", "powers", "values"]
)
def test_a_product_and_its_gradients(recipe, keep_values):
    rows, weights, gradient = _inputs(DEPTH, WIDTH)
    power = recipe.scales == "power_of_two"
    columns_from = rows if keep_values else None
    wanted = _products(rows, weights, gradient, power=power, gradient_power=power, columns_from=columns_from)
    found = _found(recipe, keep_values, rows, weights, gradient)
    _assert_close(found, wanted, [jnp.float32] * 3)
    in_bfloat16 = _found(
        recipe, keep_values, jnp.asarray(rows, jnp.bfloat16), weights, jnp.asarray(gradient, jnp.bfloat16)
    )
    _assert_close(in_bfloat16, wanted, [jnp.bfloat16, jnp.bfloat16, jnp.float32])


def test_gradients_of_a_large_batch_are_as_exact_as_those_of_a_small_one():
    """A loss is divided by the tokens of its batch: by a power of two, gradients become smaller and nothing else."""
    rows, weights, gradient = _inputs(DEPTH, WIDTH)
    _, *wanted = _found(Recipe(), False, rows, weights, gradient)
    _, *found = _found(Recipe(), False, rows, weights, gradient * np.float32(2.0**-50))
    for one, other in zip(found, wanted, strict=True):
        mine = slice(0, sum(SIZES) if one.ndim == 2 else None)  # what is no row means nothing
        np.testing.assert_array_equal(np.asarray(one)[mine], np.asarray(other)[mine] * np.float32(2.0**-50))


def test_swiglu_is_multiplied_as_it_is_and_computed_again_from_fp8():
    hidden, width = 128, 72
    both, weights, gradient = _inputs(2 * hidden, width)
    both = np.clip(both, -30, 30)
    weights, scale_M = weights[:, :hidden], np.random.default_rng(0).uniform(0.1, 1, ROWS).astype(np.float32)

    def swiglu(both, scale_M):
        gate, up = np.split(both.astype(np.float64), 2, axis=1)
        return (gate / (1 + np.exp(-gate)) * up * scale_M[:, None]).astype(np.float32)

    @jax.jit
    def found(both, weights, scale_M, gradient):
        def layer(both, weights, scale_M):
            matrices = Encoded(quantized_blocks(jax.lax.stop_gradient(weights), Recipe()), weights)
            sizes = jnp.array(SIZES, jnp.int32)
            inputs = both, scale_M
            return product_of_swiglu(weighted_swiglu, inputs, matrices, sizes, Recipe(), came_in=POWERS)

        out, transpose = jax.vjp(layer, both, weights, scale_M)
        return out, *transpose(gradient)

    again = reference.as_rows(both)
    forward = _products(swiglu(both, scale_M), weights, gradient, gradient_power=True)
    backward = _products(swiglu(again, scale_M), weights, gradient, gradient_power=True,
                         columns_from=swiglu(again, scale_M))  # fmt: skip
    gate, up = np.split(again, 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    of_gate = backward[1] * scale_M[:, None] * up * sigmoid * (1 + gate * (1 - sigmoid))
    of_up = backward[1] * scale_M[:, None] * gate * sigmoid
    of_scale = (backward[1] * gate * sigmoid * up).sum(axis=1)
    out, of_both, of_weights, of_scale_found = found(both, weights, scale_M, gradient)
    mine = slice(0, sum(SIZES))
    for one, other in (
        (out[mine], forward[0][mine]),
        (of_both[mine], np.concatenate([of_gate, of_up], axis=1)[mine]),
        (of_weights, backward[2]),
        (of_scale_found[mine], of_scale[mine]),
    ):
        # A number on the border of two codes may fall to either side: one of 16 steps, of one number in a thousand.
        other = np.asarray(other)
        off = np.abs(np.asarray(one, np.float64) - other) / np.abs(other).max()
        assert np.quantile(off, 0.99) < 1e-5 and off.max() < 1e-2
