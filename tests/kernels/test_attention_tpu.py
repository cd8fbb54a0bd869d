"""The TPU's causal attention, emulated on a CPU, against softmax written out; and lowered for TPUs on a mesh."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from dsv3_jax.kernels import attention_grid_tpu, attention_tpu
from dsv3_jax.kernels.attention import causal_attention
from sharding.mesh import on_mesh
from tests.kernels.test_attention import SCALE, _dense, _inputs, _naive


def _gradients_too(query, key, value, cotangent, segments):
    out, backward = jax.vjp(lambda *inputs: causal_attention(*inputs, SCALE, segments), query, key, value)
    return out, *backward(cotangent)


@pytest.fixture
def emulated(monkeypatch):
    """The function of the users, with the TPU's kernels emulated and blocks small enough to need several."""
    kernels = SimpleNamespace(
        forward=functools.partial(attention_tpu.forward, interpret=True),
        backward=functools.partial(attention_tpu.backward, interpret=True),
    )
    monkeypatch.setattr("dsv3_jax.kernels.attention._kernels", lambda: kernels)
    monkeypatch.setattr(attention_grid_tpu, "BLOCK", 256)
    monkeypatch.setattr(attention_grid_tpu, "PIECE", 128)
    return jax.jit(lambda *inputs: _gradients_too(*inputs))  # a function of its own, for a cache of its own


# float32 takes half the block: 300 and 500 are three and four blocks, of bfloat16 two with two pieces each.
@pytest.mark.parametrize(
    ("sequence", "isolated", "dtype", "tolerance"),
    [
        *((sequence, False, "float32", 2e-5) for sequence in (1, 127, 128, 300)),
        *((sequence, True, "float32", 2e-5) for sequence in (127, 500)),
        (300, False, "bfloat16", 0.03),
        (500, True, "bfloat16", 0.03),
    ],
)
def test_output_and_gradients_are_those_of_dense_attention(emulated, sequence, isolated, dtype, tolerance):
    inputs = _inputs(sequence, jnp.dtype(dtype), heads=1)
    segments = None
    if isolated:  # of a token, of many, past the end of a block, and different in the two rows
        starts = np.random.default_rng(0).random((2, sequence)) < 0.01
        segments = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=inputs[2].shape), dtype)
    out, *gradients = emulated(*inputs, cotangent, segments)
    assert out.dtype == inputs[2].dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), _naive(*inputs, segments), rtol=tolerance, atol=tolerance)
    exact = [x.astype(jnp.float32) for x in inputs]
    segments = jnp.zeros((2, sequence), jnp.int32) if segments is None else segments
    expected = jax.jit(lambda *x: jax.vjp(lambda *x: _dense(*x, segments), *x)[1](cotangent.astype(jnp.float32)))(
        *exact
    )
    for found, of_dense, value in zip(gradients, expected, inputs, strict=True):
        assert found.dtype == value.dtype
        np.testing.assert_allclose(found.astype(jnp.float32), of_dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("head", "value"), [(192, 128), (24, 136)])
def test_head_dims_of_more_and_less_than_whole_registers(emulated, head, value):
    query, key, values = _inputs(130, batch=1, heads=1, head=head, value=value)
    query = query / head**0.5
    out, *gradients = emulated(query, key, values, jnp.ones_like(values), None)
    np.testing.assert_allclose(out, _naive(query, key, values), rtol=1e-5, atol=1e-5)
    expected = jax.grad(lambda *x: _dense(*x, jnp.zeros((1, 130))).sum(), (0, 1, 2))(query, key, values)
    for found, of_dense in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, of_dense, rtol=2e-5, atol=2e-5)


def test_the_future_cannot_be_felt_even_as_a_nan(emulated):
    query, key, value = _inputs(300)
    found = emulated(query, key, value, value, None)[0]
    later = emulated(query, key.at[:, 70:].set(jnp.nan), value.at[:, 70:].set(1e4), value, None)[0]
    np.testing.assert_array_equal(found[:, :70], later[:, :70])
    assert bool(jnp.isnan(later[:, 70:]).all())


def test_large_logits_neither_overflow_nor_blur(emulated):
    query, key, value = (each.astype(jnp.bfloat16) for each in _inputs(300))
    found = emulated(300 * query, 300 * key, value, value, None)[0]
    np.testing.assert_allclose(np.asarray(found, np.float64), _naive(300 * query, 300 * key, value), atol=0.02)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 9])
def test_the_grid_is_the_visible_pairs_each_sums_one_after_the_other(blocks, by_key):
    folds, steps = attention_grid_tpu._folded(blocks)
    at = [attention_grid_tpu._pair(fold, step, blocks, by_key) for fold in range(folds) for step in range(steps)]
    found = [(int(outer), int(inner)) for outer, inner in at]
    assert sorted(found) == sorted(
        (outer, inner) for outer in range(blocks) for inner in (range(outer, blocks) if by_key else range(outer + 1))
    )
    for outer in range(blocks):
        places = [place for place, pair in enumerate(found) if pair[0] == outer]
        assert places == list(range(places[0], places[-1] + 1))
        assert found[places[0]][1] == (blocks - 1 if by_key else 0) and found[places[-1]] == (outer, outer)


def test_it_is_chosen_and_lowered_for_a_mesh_of_tpus():
    """With the check of what varies over devices on. Emulation does not pass it: jax's own loop over the grid fails."""
    device = AbstractDevice("TPU v5p", 2, "tpu")
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    rows, heads = PartitionSpec("fsdp"), PartitionSpec("fsdp", None, "tensor")
    step = jax.jit(on_mesh(_gradients_too, mesh, ((heads,) * 4 + (rows,)), (heads,) * 4))
    for dtype in (jnp.bfloat16, jnp.float32):
        inputs = [jax.ShapeDtypeStruct((2, 3000, 4, dim), dtype) for dim in (192, 192, 128, 128)]
        inputs.append(jax.ShapeDtypeStruct((2, 3000), jnp.int32))
        text = step.trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == 3
