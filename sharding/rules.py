"""THE table: where each logical axis of a parameter goes on the mesh.

A parameter names its dims where it is made; nothing else says where it lives. Two kinds of axes:
    computed  a device multiplies with its piece alone: experts, and what tensor parallelism divides
    stored    a device keeps a piece, and gathers the whole before it multiplies (fully sharded data parallelism)

A model that only runs is stored in fewer pieces (`RUNNING`): there is no gradient and no optimizer to find room for,
and what a step over whole rows gathers in passing would be most of the time of a step over one token a row.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sharding.mesh import LayoutError

EXPERT_AXES = ("node", "expert")
TENSOR_AXES = ("tensor",)

# Whatever divides tokens but holds no copy of the model on purpose ("data") can hold a piece of it.
STORED_AXES = ("fsdp", "node", "expert", "context")

COMPUTED: dict[str, tuple[str, ...]] = {
    "vocabulary": TENSOR_AXES,
    "heads": TENSOR_AXES,
    "ffn": TENSOR_AXES,
    "experts": EXPERT_AXES,
    "expert_ffn": TENSOR_AXES,
    # Every device holds these dims whole.
    "layers": (),
    "gain": (),
    "gate_up": (),
    "router_experts": (),
    "query_latent": (),
    "query_key_dim": (),
    "key_value_latent_and_rope": (),
    "nope_and_value_dim": (),
    "value_dim": (),
    "embedding_and_hidden": (),
}
STORED: dict[str, tuple[str, ...]] = {
    "width": STORED_AXES,
    "latent": STORED_AXES,
    # Where a parameter has experts, their dim has taken the expert axes.
    "expert_width": tuple(axis for axis in STORED_AXES if axis not in EXPERT_AXES),
    "running_width": ("fsdp",),
    "running_latent": ("fsdp",),
}
RUNNING = {"width": "running_width", "latent": "running_latent"}
"""What dims are called in a model that only runs."""


class Stored(NamedTuple):
    """The dim along which a parameter has to be gathered before it is used."""

    dim: int
    axes: tuple[str, ...]


def mesh_axes(logical_axis: str) -> tuple[str, ...]:
    """Mesh axes of one logical axis. Raises LayoutError for a name that the table lacks."""
    for table in (COMPUTED, STORED):
        if logical_axis in table:
            return table[logical_axis]
    raise LayoutError(f"logical axis {logical_axis!r} is not in the table of sharding/rules.py")


def stored_dim(logical_axes: Sequence[str]) -> Stored | None:
    """Where a parameter with these dims is stored in pieces; None: what a device holds of it is what it uses."""
    for dim, name in enumerate(logical_axes):
        if name in STORED:
            return Stored(dim, STORED[name])
    return None


def partition_spec(logical_axes: Sequence[str], mesh: Mesh) -> PartitionSpec:
    """The mesh axes of every dim of a parameter, those that the mesh has."""
    dims = [tuple(axis for axis in mesh_axes(name) if axis in mesh.axis_names) for name in logical_axes]
    return PartitionSpec(*(axes or None for axes in dims))


def partition_specs(logical_axes: Any, mesh: Mesh) -> Any:
    """`partition_spec` of every parameter of a tree whose leaves are tuples of logical axes."""
    return jax.tree.map(lambda axes: partition_spec(axes, mesh), logical_axes, is_leaf=_is_axes)


def check_layout(shapes: Any, logical_axes: Any, mesh: Mesh | AbstractMesh) -> None:
    """Refuse a mesh that the parameters cannot be divided over.

    Args:
        shapes: tree of anything with a `shape`.
        logical_axes: the same tree of tuples of names.

    Raises:
        LayoutError: names the parameter, the dim, both sizes and the sizes that would work.
    """
    for name, shape, axes in named_leaves(shapes, logical_axes):
        taken: dict[str, str] = {}
        for logical_axis, size in zip(axes, shape, strict=True):
            used = [axis for axis in mesh_axes(logical_axis) if axis in mesh.axis_names]
            for axis in used:
                if axis in taken:
                    raise LayoutError(
                        f"parameter {name}: mesh axis {axis!r} would divide both {taken[axis]!r} and {logical_axis!r}"
                    )
                taken[axis] = logical_axis
            parts = math.prod(mesh.shape[axis] for axis in used)
            if size % parts:
                product = " * ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in used)
                works = [count for count in range(1, min(size, 2 * parts) + 1) if size % count == 0]
                raise LayoutError(
                    f"parameter {name}: {product} must divide its {logical_axis!r} of {size}; their product may be "
                    f"{', '.join(map(str, works))}"
                )


def named_leaves(shapes: Any, logical_axes: Any) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Dotted name, shape and logical axes of every parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, leaf), axes in zip(leaves, jax.tree.leaves(logical_axes, is_leaf=_is_axes), strict=True):
        yield jax.tree_util.keystr(path, simple=True, separator="."), tuple(leaf.shape), axes


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(isinstance(name, str) for name in leaf)
