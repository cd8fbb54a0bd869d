"""The contract of `ship`, against rows copied one by one: any sizes, none, all to one, longer than a bucket."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding.mesh import on_mesh
from sharding.transport import Shipment, ship

ROWS, ROOM, D = 20, 24, 3


def _random_sizes(devices: int, seed: int) -> np.ndarray:
    """sizes[s, r] with no sender or receiver over its room."""
    random, sizes = np.random.default_rng(seed), np.zeros((devices, devices), int)
    for _ in range(4 * devices):
        sender, receiver = random.integers(devices, size=2)
        more = min(random.integers(1, 8), ROWS - sizes[sender].sum(), ROOM - sizes[:, receiver].sum())
        sizes[sender, receiver] += more
    return sizes


def _all_to_one(devices: int, _: int) -> np.ndarray:
    sizes = np.zeros((devices, devices), int)
    sizes[:, devices - 1] = ROOM // devices
    return sizes


def _one_to_one(devices: int, _: int) -> np.ndarray:
    sizes = np.zeros((devices, devices), int)
    sizes[0, devices - 1] = ROWS
    return sizes


def _nothing(devices: int, _: int) -> np.ndarray:
    return np.zeros((devices, devices), int)


@pytest.mark.parametrize("axes", [{"expert": 2}, {"expert": 8}, {"node": 2, "expert": 4}], ids=str)
@pytest.mark.parametrize("sizes_of", [_random_sizes, _all_to_one, _one_to_one, _nothing])
def test_rows_arrive_where_the_shipment_says_and_come_back(sizes_of, axes, mesh_with):
    mesh, names = mesh_with(**axes), tuple(axes)
    devices = mesh.size
    sizes = sizes_of(devices, devices)
    # Gaps between the parts, on both sides: offsets are obeyed, not deduced.
    send = np.cumsum(sizes, axis=1) - sizes
    land = np.cumsum(sizes, axis=0) - sizes
    assert sizes.sum(axis=1).max() <= ROWS and sizes.sum(axis=0).max() <= ROOM
    rows = np.random.default_rng(0).normal(size=(devices, ROWS, D)).astype(np.float32)
    into = -np.ones((devices, ROOM, D), np.float32)
    expected, returned = into.copy(), -2 * np.ones_like(rows)
    for sender in range(devices):
        for receiver in range(devices):
            for row in range(sizes[sender, receiver]):
                sent = rows[sender, send[sender, receiver] + row]
                expected[receiver, land[sender, receiver] + row] = sent
                returned[sender, send[sender, receiver] + row] = 2 * sent
    # Of each device: what it sends to each, where that lands, what it gets from each, where that began.
    tables = Shipment(send, sizes, land, land.T, sizes.T, send.T)

    def of_device(rows, into, tables):
        shipment = Shipment(*(table[0] for table in tables))
        arrived = ship(rows[0], into[0], shipment, names)
        back = ship(2 * arrived, jnp.full_like(rows[0], -2), shipment.reversed(), names)
        return arrived[None], back[None]

    spec = PartitionSpec(names)
    arguments = (rows, into, jax.tree.map(lambda table: jnp.asarray(table, jnp.int32), tables))
    arrived, back = jax.jit(on_mesh(of_device, mesh, spec, spec))(*arguments)
    np.testing.assert_array_equal(arrived, expected)
    np.testing.assert_array_equal(back, returned)
