"""A configuration on the devices at hand: its mesh, refused where the model or the batch does not divide over it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3_jax.config import Config, divisors
from dsv3_jax.model.functional import Skeleton, abstract_trees, logical_axes
from sharding.mesh import ROW_AXES, LayoutError, axis_sizes, make_mesh, row_shards
from sharding.rules import check_layout


def mesh_of(config: Config, skeleton: Skeleton, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config.mesh` asks for, of all devices unless given.

    Raises:
        LayoutError: the axes do not multiply to the devices, or a parameter or the batch does not divide over them.
    """
    devices = jax.devices() if devices is None else devices
    mesh = make_mesh(axis_sizes(dataclasses.asdict(config.mesh), len(devices)), devices)
    check_layout(abstract_trees(skeleton)[0], logical_axes(skeleton), mesh)
    _check_batch(config, mesh)
    return mesh


def _check_batch(config: Config, mesh: Mesh) -> None:
    training, shards = config.training, row_shards(mesh)
    rows = training.batch_size // training.microbatches
    if rows % shards:
        axes = " * ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in ROW_AXES if axis in mesh.axis_names)
        raise LayoutError(
            f"{axes} must divide the rows of a microbatch, training.batch_size / training.microbatches = {rows}; "
            f"their product may be {', '.join(map(str, divisors(rows)))}"
        )
