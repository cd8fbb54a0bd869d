from collections.abc import Callable

import jax
import pytest
from jax.sharding import Mesh

from sharding.mesh import axis_sizes, make_mesh


@pytest.fixture(scope="session")
def mesh_with() -> Callable[..., Mesh]:
    """`mesh_with(data=2, expert=4)`: a mesh of the first devices, the other axes 1."""

    def make(**sizes: int) -> Mesh:
        sizes = axis_sizes({"data": -1, **sizes}, _product(sizes))
        return make_mesh(sizes, jax.devices()[: _product(sizes)])

    return make


def _product(sizes: dict[str, int]) -> int:
    product = 1
    for size in sizes.values():
        product *= size
    return product
