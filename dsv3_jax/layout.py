"""A configuration on the devices at hand: its mesh, refused where the model or the batch does not divide over it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import Config, MeshConfig
from dsv3_jax.config_checks import divisors
from dsv3_jax.inference.placement import check_mesh
from dsv3_jax.kernels.quantization import TILE
from dsv3_jax.model.functional import Skeleton, abstract_trees, logical_axes
from sharding.mesh import ROW_AXES, LayoutError, axis_sizes, make_mesh, one_device, row_shards
from sharding.rules import check_layout, mesh_axes, named_leaves


def mesh_of(config: Config, skeleton: Skeleton, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config.mesh` asks for, of all devices unless given.

    Raises:
        LayoutError: the axes do not multiply to the devices, or a parameter or the batch does not divide over them.
    """
    devices = jax.devices() if devices is None else devices
    mesh = make_mesh(axis_sizes(dataclasses.asdict(config.mesh), len(devices)), devices)
    _check(config, skeleton, mesh)
    return mesh


def mesh_to_run(requested: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh for a model that only runs, of all devices unless given; where every axis is 1, the first of them.

    Raises:
        LayoutError: the axes do not multiply to the devices.
        PlacementError: a mesh that models cannot generate on.
    """
    sizes = dataclasses.asdict(requested)
    if all(size == 1 for size in sizes.values()):
        return one_device() if devices is None else make_mesh(axis_sizes(sizes, 1), devices[:1])
    devices = jax.devices() if devices is None else devices
    mesh = make_mesh(axis_sizes(sizes, len(devices)), devices)
    check_mesh(mesh)
    return mesh


def _check(config: Config, skeleton: Skeleton, mesh: Mesh | AbstractMesh) -> None:
    check_layout(abstract_trees(skeleton)[0], logical_axes(skeleton), mesh)
    _check_batch(config, mesh)
    _check_rollouts(config, mesh)
    _check_context(config, mesh)
    _check_tiles(config, skeleton, mesh)


def _check_batch(config: Config, mesh: Mesh | AbstractMesh) -> None:
    training, shards = config.training, row_shards(mesh)
    rows = training.batch_size // training.microbatches
    if rows % shards:
        axes = " * ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in ROW_AXES if axis in mesh.axis_names)
        raise LayoutError(
            f"{axes} must divide the rows of a microbatch, training.batch_size / training.microbatches = {rows}; "
            f"their product may be {', '.join(map(str, divisors(rows)))}"
        )


def _check_rollouts(config: Config, mesh: Mesh | AbstractMesh) -> None:
    if config.data.kind == "rollouts" and config.grpo.prompts % row_shards(mesh):
        raise LayoutError(
            f"grpo.prompts={config.grpo.prompts} must be a multiple of {row_shards(mesh)}, the parts that the mesh "
            "divides rows into: a group is made in one of them"
        )


def _check_context(config: Config, mesh: Mesh | AbstractMesh) -> None:
    sequence, devices = config.training.sequence_length, mesh.shape.get("context", 1)
    if devices > 1 and sequence % (2 * devices):
        raise LayoutError(
            f"mesh.context={devices}: twice that must divide training.sequence_length={sequence}; mesh.context may be "
            f"{', '.join(str(half // 2) for half in divisors(sequence) if half % 2 == 0)}"
        )


def _check_tiles(config: Config, skeleton: Skeleton, mesh: Mesh | AbstractMesh) -> None:
    """In FP8 a device's part of what tensor parallelism divides is whole tiles: of one that is cut no device would know
    the largest number. The last tile of a width that is not divided may be shorter."""
    parts = mesh.shape.get("tensor", 1)
    if config.model.precision != "fp8" or parts == 1:
        return
    for name, shape, axes in named_leaves(abstract_trees(skeleton)[0], logical_axes(skeleton)):
        for dim, axis in enumerate(axes):
            if axis not in ("heads", "ffn", "expert_ffn"):
                continue
            # Heads and what a head has are one dim of a matrix.
            numbers = shape[dim] * (shape[dim + 1] if axis == "heads" else 1)
            if numbers // parts % TILE:
                works = [count for count in divisors(shape[dim]) if count == 1 or numbers // count % TILE == 0]
                raise LayoutError(
                    f"parameter {name}: mesh.tensor={parts} cuts its {axis!r}, {numbers} numbers, within a tile of "
                    f"{TILE}, which model.precision=fp8 cannot; mesh.tensor may be {', '.join(map(str, works))}"
                )


def describe(config: Config, skeleton: Skeleton, devices: int) -> str:
    """Every parameter's shape, axes, place on the mesh and bytes a device, as a table. Allocates nothing.

    The mesh may be of more devices than there are here: an axis that takes the rest then takes one.

    Raises:
        LayoutError: as `mesh_of`.
    """
    mesh = _imagined_mesh(config, devices)
    shapes, axes = abstract_trees(skeleton)[0], logical_axes(skeleton)
    _check(config, skeleton, mesh)
    rows, total = [("parameter", "shape", "axes", "a device has", "bytes")], 0
    for name, shape, names in named_leaves(shapes, axes):
        parts = [math.prod(mesh.shape.get(axis, 1) for axis in mesh_axes(logical)) for logical in names]
        piece = [size // part for size, part in zip(shape, parts, strict=True)]
        total += 4 * math.prod(piece)
        placed = [_placed(logical, mesh) for logical in names]
        rows.append((name, _by(shape), ", ".join(placed), _by(piece), f"{4 * math.prod(piece):,}"))
    written = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in mesh.axis_names) or "one device"
    return "\n".join(
        [
            f"mesh: {written}" + (f" = {mesh.size} devices" if mesh.axis_names else ""),
            *_table(rows),
            f"float32 parameters {total:,} bytes a device; with gradients and two moments of AdamW {4 * total:,}",
        ]
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of columns, the last one aligned right."""
    *widths, last = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[cell.ljust(width) for cell, width in zip(row, widths, strict=False)] for row in rows]
    return ["  ".join([*cells, row[-1].rjust(last)]) for cells, row in zip(aligned, rows, strict=True)]


def _imagined_mesh(config: Config, devices: int) -> AbstractMesh:
    requested = dataclasses.asdict(config.mesh)
    given = math.prod(size for size in requested.values() if size > 0)
    sizes = axis_sizes(requested, devices if devices % given == 0 and -1 in requested.values() else given)
    used = {axis: size for axis, size in sizes.items() if size > 1}
    return AbstractMesh(tuple(used.values()), tuple(used))


def _placed(logical_axis: str, mesh: Any) -> str:
    used = [axis for axis in mesh_axes(logical_axis) if axis in mesh.axis_names]
    return f"{logical_axis}: {' x '.join(used)}" if used else logical_axis


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
