"""Attention of rows divided over devices is attention of whole rows, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.kernels.attention import causal_attention
from dsv3_jax.kernels.context_attention import context_attention
from sharding.context import context_chunks, context_part, context_whole
from sharding.mesh import axis_sizes, make_mesh, on_mesh

B, H, D, V = 2, 3, 6, 4
SCALE = 0.4


EVERYWHERE, BY_DEVICE = PartitionSpec(), PartitionSpec("context")


def _on_context(function, devices: int, out_specs):
    mesh = make_mesh(axis_sizes({"context": devices}, devices), jax.devices()[:devices])
    return jax.jit(on_mesh(function, mesh, EVERYWHERE, out_specs))


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_parts_of_rows_make_whole_rows_again_and_cover_early_and_late_alike(devices):
    rows = jnp.arange(2 * 16 * 3.0).reshape(2, 16, 3)

    def of_device(rows):
        part = context_part(rows)
        first, second = context_chunks()
        return jax.lax.psum(context_whole(part), "context") / devices, part[None], (first + second)[None]

    whole, parts, sums = _on_context(of_device, devices, (EVERYWHERE, BY_DEVICE, BY_DEVICE))(rows)
    np.testing.assert_array_equal(whole, rows)
    np.testing.assert_array_equal(np.sort(np.ravel(parts)), np.ravel(rows))
    assert np.unique(sums).tolist() == [2 * devices - 1]
    np.testing.assert_array_equal(
        parts[0][:, :, 0], np.concatenate([rows[:, : 8 // devices, 0], rows[:, -8 // devices :, 0]], 1)
    )


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(("devices", "length"), [(2, 4), (2, 24), (4, 40), (8, 16)])
def test_attention_and_its_gradient_are_those_of_whole_rows(devices, length, isolated):
    random = np.random.default_rng(length)
    shapes = (B, length, H, D), (B, length, H, D), (B, length, H, V), (B, length, H, V)
    query, key, value, cotangent = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    segments = None
    if isolated:  # of one token, of many, and different in the two rows
        starts = random.random((B, length)) < 0.2
        segments = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)

    def of_device(query, key, value, cotangent):
        ids = None if segments is None else (context_part(segments), segments)
        mixed, transpose = jax.vjp(
            lambda query, key, value: context_attention(context_part(query), key, value, SCALE, ids), query, key, value
        )
        gradients = transpose(context_part(cotangent))
        # Every device has the whole row of the output and its own share of the gradients.
        return jax.lax.psum(context_whole(mixed), "context") / devices, gradients

    found, gradients = _on_context(of_device, devices, EVERYWHERE)(query, key, value, cotangent)
    wanted, transpose = jax.vjp(lambda *inputs: causal_attention(*inputs, SCALE, segments), query, key, value)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    for gradient, exact in zip(gradients, transpose(cotangent), strict=True):
        np.testing.assert_allclose(gradient, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
