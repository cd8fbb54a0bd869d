"""Devices as a mesh with named axes.

    data      copies of the model
    fsdp      pieces of parameters, gradients and optimizer state, gathered layer by layer
    node      groups of devices with slow links between them; experts are divided over it
    expert    experts are divided over it
    context   positions of a row are divided over it
    tensor    heads, feed-forward widths and vocabulary are divided over it

The first four divide the rows of a batch.

Inside `on_mesh` a function sees its own device's part of everything and talks to the others by collectives; the axes it
may name are those of size above 1. On one device there are none, and the same function does without.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# Slow links outside, fast ones inside: neighbours along the last axis are neighbours on the wires.
AXES = ("data", "fsdp", "node", "expert", "context", "tensor")

ROW_AXES = ("data", "fsdp", "node", "expert")
"""Axes that rows of the batch are divided over."""
TOKEN_AXES = (*ROW_AXES, "context")
"""Axes along which devices hold different tokens."""
SLICE_AXES = ("data", "fsdp", "node")
"""Axes that may cross from one slice of a machine to another, over its data-centre network."""

PartitionSpecs = Any


class LayoutError(ValueError):
    """A mesh that devices, model or batch do not fit. The message names the field, its value and what would do."""

    exit_code = 2


def axis_sizes(requested: Mapping[str, int], devices: int) -> dict[str, int]:
    """Size of every axis in AXES; the one given as -1 takes the devices that the others leave.

    Raises:
        LayoutError: a size below 1, several -1, or sizes whose product is not the number of devices.
    """
    sizes = {axis: requested.get(axis, 1) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise LayoutError(f"mesh.{axis}={size} must be at least 1, or -1 for the devices that the other axes leave")
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise LayoutError(f"mesh.{rest[0]}=-1 and mesh.{rest[1]}=-1: only one axis can take the rest")
    given = {axis: size for axis, size in sizes.items() if size > 1}
    product = int(np.prod(list(given.values()), dtype=int))
    if rest and devices % product == 0:
        return {**sizes, rest[0]: devices // product}
    if product != devices:
        written = " * ".join(f"mesh.{axis}={size}" for axis, size in given.items()) or "every mesh axis at 1"
        wanted = "divide" if rest else "be"
        hint = "" if rest else "; one axis may be -1, the rest"
        raise LayoutError(f"{written} makes {product}, which must {wanted} the number of devices, {devices}{hint}")
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the axes above 1, in the order of AXES; of one device, a mesh with an axis that no rule names.

    Raises:
        LayoutError: the outer axes cannot be cut into the slices that the devices are in.
    """
    devices = jax.devices() if devices is None else devices
    used = {axis: sizes[axis] for axis in AXES if sizes[axis] > 1}
    if not used:
        return Mesh(np.array(devices[:1]), ("device",), axis_types=(AxisType.Auto,))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    between = _sizes_between_slices(used, slices)
    within = [size // outer for size, outer in zip(used.values(), between, strict=True)]
    if slices > 1:
        placed = create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    else:
        placed = create_device_mesh(within, devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(used), axis_types=(AxisType.Auto,) * len(used))


def _sizes_between_slices(sizes: Mapping[str, int], slices: int) -> list[int]:
    """How often each axis steps from slice to slice of a multi-slice machine: the outer axes first."""
    between, left = [], slices
    for axis, size in sizes.items():
        between.append(math.gcd(size, left) if axis in SLICE_AXES else 1)
        left //= between[-1]
    if left > 1:
        given = ", ".join(f"mesh.{axis}={sizes.get(axis, 1)}" for axis in SLICE_AXES)
        raise LayoutError(f"{given}: the product of these must be a multiple of the {slices} slices of the machine")
    return between


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh around what is being traced; outside of one, of jax's own devices.

    The two differ when a program is compiled for machines that are not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """What jax calls the devices, such as "TPU7x", "NVIDIA H200", "cpu"; of which devices, as in `platform`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def one_device() -> Mesh:
    """The first device alone."""
    return make_mesh(dict.fromkeys(AXES, 1))


def on_mesh(
    function: Callable[..., Any], mesh: Mesh, in_specs: PartitionSpecs, out_specs: PartitionSpecs
) -> Callable[..., Any]:
    """`function` on every device's part of its arguments, the parts of its results put together."""
    # check_vma proves, when the function is traced, that what is declared equal on all devices of an axis is equal, and
    # makes gradients right: of a value that several devices use, the sum of theirs.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)


def row_spec(mesh: Mesh) -> PartitionSpec:
    """Rows of a batch, divided over ROW_AXES."""
    return PartitionSpec(tuple(axis for axis in ROW_AXES if axis in mesh.axis_names) or None)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    return int(np.prod([mesh.shape.get(axis, 1) for axis in ROW_AXES], dtype=int))


def place_rows(blocks: Mapping[int, np.ndarray], rows: int, mesh: Mesh) -> jax.Array:
    """An array of `rows` rows divided over ROW_AXES, from the blocks this process has, by their first row.

    They must hold every row of this process's devices (`rows_here`); there may be more.
    """
    shape = (rows, *next(iter(blocks.values())).shape[1:])

    def of_device(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        parts = [block[max(start - first, 0) : max(stop - first, 0)] for first, block in sorted(blocks.items())]
        return np.concatenate(parts)

    return jax.make_array_from_callback(shape, NamedSharding(mesh, row_spec(mesh)), of_device)


def rows_here(rows: int, mesh: Mesh) -> set[int]:
    """Of so many rows divided over ROW_AXES, those that this process's devices hold."""
    indices = NamedSharding(mesh, row_spec(mesh)).addressable_devices_indices_map((rows,))
    return {row for index in indices.values() if index for row in range(*index[0].indices(rows))}


def shardings(mesh: Mesh, specs: PartitionSpecs) -> Any:
    """NamedShardings in place of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
