"""Axis sizes from a request, the mesh they make, and rows placed on it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding.mesh import (
    AXES,
    LayoutError,
    axis_sizes,
    make_mesh,
    on_mesh,
    one_device,
    place_rows,
    row_shards,
    rows_here,
)


@pytest.mark.parametrize(
    ("requested", "devices", "expected"),
    [
        ({}, 1, {}),
        ({"data": -1}, 1, {}),
        ({"data": -1}, 8, {"data": 8}),
        ({"data": 2, "fsdp": 4}, 8, {"data": 2, "fsdp": 4}),
        ({"fsdp": -1, "expert": 4, "data": 1}, 8, {"fsdp": 2, "expert": 4}),
        ({"fsdp": -1, "expert": 8}, 8, {"expert": 8}),
    ],
)
def test_sizes_multiply_to_the_devices_and_one_axis_takes_the_rest(requested, devices, expected):
    assert axis_sizes(requested, devices) == {**dict.fromkeys(AXES, 1), **expected}


@pytest.mark.parametrize(
    ("requested", "named"),
    [
        ({"expert": 3}, "mesh.expert=3 makes 3, which must be the number of devices, 8; one axis may be -1"),
        ({"expert": 3, "data": -1}, "mesh.expert=3 makes 3, which must divide the number of devices, 8"),
        ({"data": 2, "tensor": 2}, "mesh.data=2 * mesh.tensor=2 makes 4, which must be the number of devices, 8"),
        ({"data": -1, "fsdp": -1}, "mesh.data=-1 and mesh.fsdp=-1: only one"),
        ({"expert": 0}, "mesh.expert=0 must be at least 1, or -1"),
        ({"tensor": -2}, "mesh.tensor=-2 must be at least 1, or -1"),
        ({}, "every mesh axis at 1 makes 1"),
    ],
)
def test_a_request_that_does_not_fit_names_the_axis_its_size_and_the_devices(requested, named):
    with pytest.raises(LayoutError) as caught:
        axis_sizes(requested, 8)
    assert str(caught.value).startswith(named)


def test_a_mesh_has_the_axes_above_one_the_fast_links_last():
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "tensor": 2, "data": 4})
    assert mesh.axis_names == ("data", "tensor") and mesh.devices.shape == (4, 2)
    assert [device.id for device in mesh.devices[0]] == [0, 1]
    assert one_device().axis_names == ("device",) and one_device().size == 1


def test_rows_lie_on_the_devices_of_all_row_axes_and_are_copied_along_the_others(mesh_with):
    mesh = mesh_with(fsdp=2, expert=2, tensor=2)
    rows = place_rows({2: np.arange(4, 8).reshape(2, 2), 0: np.arange(4).reshape(2, 2)}, 4, mesh)
    assert rows_here(4, mesh) == {0, 1, 2, 3}
    assert row_shards(mesh) == 4
    held = {shard.device.id: np.asarray(shard.data).tolist() for shard in rows.addressable_shards}
    assert [held[device.id] for device in mesh.devices.ravel()] == [
        [row] for row in [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]
    ]


def test_a_result_declared_the_same_on_all_devices_is_proved_so_when_traced(mesh_with):
    mesh, specs = mesh_with(data=4), (PartitionSpec("data"), PartitionSpec())
    rows = place_rows({0: np.arange(4.0)}, 4, mesh)
    total = jax.jit(on_mesh(lambda x: jax.lax.psum(x.sum(), "data"), mesh, *specs))
    assert total(rows) == 6
    with pytest.raises(ValueError, match="could not infer replication"):
        jax.jit(on_mesh(lambda x: x.sum(), mesh, *specs))(rows)
