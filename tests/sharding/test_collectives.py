"""Collectives against the arithmetic they stand for, gradients included; on one device they are nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding.collectives import axis_index, axis_size, gathered, largest, looked_up, present, spread, summed, variation
from sharding.mesh import on_mesh


def _run(function, mesh, in_specs, out_specs, *arguments):
    return jax.jit(on_mesh(function, mesh, in_specs, out_specs))(*arguments)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_gathered_array_is_whole_and_its_gradient_the_piece_of_the_sum(dim, mesh_with):
    mesh, axes = mesh_with(fsdp=2, expert=4), ("fsdp", "expert")
    random = np.random.default_rng(0)
    array = jnp.asarray(random.normal(size=(8, 16, 24)), jnp.float32)
    factors = jnp.asarray(random.normal(size=(8, 8, 16, 24)), jnp.float32)
    spec = PartitionSpec(*[None] * dim, axes)

    def of_device(shard, factor):
        whole, transpose = jax.vjp(lambda shard: gathered(shard, dim, axes, jnp.dtype("float32")), shard)
        return whole[None], transpose(factor[0])[0]

    by_device = PartitionSpec(axes)
    whole, gradient = _run(of_device, mesh, (spec, by_device), (by_device, spec), array, factors)
    np.testing.assert_array_equal(whole, np.broadcast_to(array, (8, *array.shape)))
    np.testing.assert_allclose(gradient, factors.sum(axis=0), rtol=1e-6, atol=1e-6)


def test_pieces_travel_in_the_compute_type_and_gradients_are_summed_in_that_of_the_parameter(mesh_with):
    """Eight gradients of 1, 1/256, 1/256, ..: in bfloat16 the small ones would vanish one by one."""
    mesh = mesh_with(fsdp=8)

    def of_device(shard):
        whole, transpose = jax.vjp(lambda shard: gathered(shard, 0, ("fsdp",), jnp.dtype("bfloat16")), shard)
        assert whole.dtype == jnp.bfloat16
        gradient = jnp.where(axis_index(("fsdp",)) == 0, 1.0, 2.0**-8).astype(jnp.bfloat16)
        return transpose(jnp.broadcast_to(gradient, whole.shape))[0]

    gradient = _run(of_device, mesh, PartitionSpec("fsdp"), PartitionSpec("fsdp"), jnp.ones(16))
    np.testing.assert_array_equal(gradient, np.full(16, 1 + 7 / 256, np.float32))


def test_rows_of_a_table_in_pieces_are_its_rows_and_their_gradient_is_the_tables(mesh_with):
    mesh, axes = mesh_with(fsdp=2, expert=4), ("fsdp", "expert")
    random = np.random.default_rng(0)
    table = jnp.asarray(random.normal(size=(5, 24)), jnp.float32)
    indices = random.integers(0, 5, (16, 3))
    cotangent = jnp.asarray(random.normal(size=(16, 3, 24)), jnp.float32)

    def of_device(table, indices, cotangent):
        found, transpose = jax.vjp(lambda table: looked_up(table, indices, axes), table)
        return found, transpose(cotangent)[0]

    by_device, by_column = PartitionSpec(axes), PartitionSpec(None, axes)
    specs = (by_column, by_device, by_device), (by_device, by_column)
    found, gradient = _run(of_device, mesh, *specs, table, indices, cotangent)
    np.testing.assert_array_equal(found, np.asarray(table)[indices])
    expected = np.zeros((5, 24))
    np.add.at(expected, indices, np.asarray(cotangent))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_spread_value_is_the_sum_of_the_devices_own(mesh_with):
    mesh, axes = mesh_with(data=2, tensor=4), ("data", "tensor")

    def of_device(value, factor):
        return jax.grad(lambda value: (spread(value, axes) * factor).sum())(value), summed(value, axes)

    value, factor = jnp.arange(3.0), jnp.arange(24.0).reshape(8, 3)
    specs = (PartitionSpec(), PartitionSpec(axes))
    gradient, same = _run(of_device, mesh, specs, (PartitionSpec(), PartitionSpec()), value, factor)
    np.testing.assert_array_equal(gradient, factor.sum(axis=0))
    np.testing.assert_array_equal(same, value, err_msg="all devices hold it: it is its own sum")


def test_sums_and_largest_values_are_over_the_devices_along_the_axes(mesh_with):
    mesh = mesh_with(data=2, expert=4)

    def of_device(x):
        x = x.reshape(())
        assert variation(x) == ("data", "expert") and axis_size(("expert", "tensor")) == 4
        return summed(x, ("expert", "tensor"))[None], largest(x, ("data", "expert")), largest(x, ("data",))[None]

    specs = (PartitionSpec("data"), PartitionSpec(), PartitionSpec("expert"))
    over_expert, over_all, over_data = _run(of_device, mesh, PartitionSpec(("data", "expert")), specs, jnp.arange(8.0))
    np.testing.assert_array_equal(over_expert, [6, 22])
    assert over_all == 7
    np.testing.assert_array_equal(over_data, [4, 5, 6, 7])


def test_off_the_mesh_they_are_nothing():
    x = jnp.arange(4.0)
    assert present(("data", "tensor")) == () and axis_size(("expert",)) == 1 and axis_index(("expert",)) == 0
    for function in (summed, largest, spread):
        assert function(x, ("data", "tensor")) is x
    assert gathered(x, 0, ("fsdp",), jnp.dtype("float32")).tolist() == x.tolist()
