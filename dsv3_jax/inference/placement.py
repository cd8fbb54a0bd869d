"""Where a model that runs lies, on one device or divided over a mesh, and functions of it compiled there.

Rows, and what is kept of them, are divided over the axes that divide a batch in training (sharding/mesh.py), heads,
widths and vocabulary over tensor, experts over node and expert. Logits are put together before a token is chosen, so
that what is chosen depends on the row alone: the same tokens on every mesh.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.errors import UserError
from dsv3_jax.model.transformer import Transformer
from sharding.context import CONTEXT_AXES
from sharding.mesh import on_mesh, row_shards, row_spec
from sharding.rules import partition_spec

# How arguments and results of a function `over` a mesh lie; they stand where arrays do in what is made of arrays.
ROWS: Any = "rows"
"""Divided over the devices."""
EVERYWHERE: Any = "everywhere"
"""The same on all devices."""


class PlacementError(UserError, ValueError):
    """A mesh that a model cannot generate on."""

    exit_code = 2


def mesh_of(model: Transformer) -> Mesh | None:
    """The mesh that the model is divided over; None: it is on one device.

    Raises:
        PlacementError: rows divided by position, or devices of several processes.
    """
    sharding = getattr(model.embedding.get_value(), "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    check_mesh(mesh)
    check_one_process(mesh)
    return mesh


def row_parts(model: Transformer) -> int:
    """How many parts rows are divided into. Raises PlacementError as `mesh_of` does."""
    mesh = mesh_of(model)
    return row_shards(mesh) if mesh else 1


def check_mesh(mesh: Mesh) -> None:
    """Raises PlacementError where rows are divided by position."""
    for axis in CONTEXT_AXES:
        if (size := mesh.shape.get(axis, 1)) > 1:
            raise PlacementError(f"mesh.{axis}={size} must be 1 to generate: a row's cache is in one piece")


def check_one_process(mesh: Mesh) -> None:
    """Raises PlacementError where the devices are those of several processes."""
    processes = len({device.process_index for device in mesh.devices.flat})
    if processes > 1:
        raise PlacementError(f"generation runs in one process, and the mesh has devices of {processes}")


def leaf_specs(structure: jax.tree_util.PyTreeDef, mesh: Mesh) -> list[PartitionSpec]:
    """Of every leaf of a model of this structure, in their order."""
    model = jax.tree.unflatten(structure, [np.zeros(())] * structure.num_leaves)
    variables = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [
        partition_spec(variable.get_metadata("logical_axes"), mesh)
        for variable in variables
        for _ in jax.tree.leaves(variable)  # of blocks in FP8 codes and scales
    ]


def placed(model: Transformer, mesh: Mesh) -> Transformer:
    """The model with every array where a function `over` the mesh takes it; those that are there already stay."""
    leaves, structure = jax.tree.flatten(model)
    places = [NamedSharding(mesh, spec) for spec in leaf_specs(structure, mesh)]
    return jax.tree.unflatten(structure, jax.device_put(leaves, places))


def over(
    mesh: Mesh | None,
    structure: jax.tree_util.PyTreeDef,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
) -> Callable[..., Any]:
    """`function(model, *arrays)` as one that takes the model's leaves, on every device's part of them and the arrays.

    Args:
        arguments: for each of the arrays ROWS or EVERYWHERE; a tree of arrays may have one of these, or a tree of them
            that its own begins with.
        results: the same of what the function returns.
    """

    def of_leaves(leaves: list[jax.Array], *arrays: Any) -> Any:
        return function(jax.tree.unflatten(structure, leaves), *arrays)

    if mesh is None:
        return of_leaves
    specs = {ROWS: row_spec(mesh), EVERYWHERE: PartitionSpec()}
    of_arguments, of_results = jax.tree.map(specs.__getitem__, (arguments, results))
    return on_mesh(of_leaves, mesh, (leaf_specs(structure, mesh), *of_arguments), of_results)
