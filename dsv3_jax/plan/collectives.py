"""The collectives of a compiled program: kind, mesh axes, bytes, how often."""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from dsv3_jax.plan.hlo import Instruction, Program, bytes_of

KINDS = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"

# What XLA:TPU makes of a reduce-scatter: an all-reduce and a slice, fused into one that sends no more than needed.
FUSED_REDUCE_SCATTER = "all-reduce-scatter"

# The program of several slices is that of each of them, and knows its own devices alone; what it tells the other slices
# is sent by the hosts.
BETWEEN_SLICES = r'_xla_megascale_transfer_type="(\w+)"'


class Collective(NamedTuple):
    kind: str
    axes: tuple[str, ...]
    """Mesh axes whose devices take part together."""
    times: int
    """Executions in one run of the program. A loop of unknown length counts once, and so does each branch."""
    bytes_sent: float
    """What one device sends over the wires in one execution, in a ring: its own part stays. Of a ragged all-to-all,
    whose rows only the run knows, as much as both its operand and its result can hold: in the dispatch, what balanced
    routing sends."""


def collectives(program: Program, mesh: Mesh) -> list[Collective]:
    """Every collective of a program that was compiled for this mesh."""
    shape = _shape_of_slice(mesh)
    crossing = tuple(axis for axis, size in zip(mesh.axis_names, shape, strict=True) if size < mesh.shape[axis])
    groups_of = _axes_by_groups(mesh, shape)
    found = []
    for instruction in program:
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and (between := re.search(BETWEEN_SLICES, instruction.rest)):
            sent = bytes_of(program.types[instruction.computation, instruction.operands[0]])
            name = between.group(1).lower().replace("_", "-")
            found.append(Collective(name, crossing, program.executions[instruction.computation], sent))
        elif kind in KINDS:
            axes = _axes(instruction.rest, mesh, shape, groups_of)
            devices = math.prod(mesh.shape[axis] for axis in axes)
            bytes_sent = _bytes_sent(instruction, kind, devices, program)
            if instruction.computation.startswith(FUSED_REDUCE_SCATTER):
                kind, bytes_sent = "reduce-scatter", bytes_sent / 2
            found.append(Collective(kind, axes, program.executions[instruction.computation], bytes_sent))
    return found


def _bytes_sent(instruction: Instruction, kind: str, devices: int, program: Program) -> float:
    size = bytes_of(instruction.result)
    if kind == "ragged-all-to-all":
        size = min(bytes_of(program.types[instruction.computation, operand]) for operand in instruction.operands[:2])
    if instruction.opcode == "all-gather-start":  # its result is operand and result together
        size *= devices / (devices + 1)
    elif instruction.opcode.endswith("-start"):
        size /= 2
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        size *= devices
    return size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def _axes(
    attributes: str, mesh: Mesh, shape: tuple[int, ...], axes_by_groups: dict[frozenset, tuple[str, ...]]
) -> tuple[str, ...]:
    """From replica_groups={{0,1},{2,3}}, [2,2]<=[2,2]T(1,0) or mesh['data'=2,'fsdp'=2] {'fsdp'}, or from pairs."""
    if named := re.search(r"replica_groups=mesh\[.*?\] \{(.*?)\}", attributes):
        names = re.findall(r"'(\w+)'", named.group(1))
        return tuple(axis for axis in mesh.axis_names if axis in names)
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        written, dims, order = counted.groups()
        ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
        groups = (ids.transpose(_numbers(order)) if order else ids).reshape(_numbers(written)).tolist()
        return axes_by_groups[_as_sets(groups)]
    listed = re.search(r"(replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}", attributes)
    if not listed:
        raise ValueError(f"no devices named in {attributes}")
    groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed.group(2))]
    return (
        axes_by_groups[_as_sets(groups)] if listed.group(1) == "replica_groups" else _axes_of_pairs(groups, mesh, shape)
    )


def _shape_of_slice(mesh: Mesh) -> tuple[int, ...]:
    """Devices of one slice along each axis: the mesh itself, unless it is of several slices."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0) or 0, otypes=[int])(mesh.devices)
    return tuple(len(np.unique(places)) for places in np.nonzero(slices == slices.flat[0]))


def _axes_by_groups(mesh: Mesh, shape: tuple[int, ...]) -> dict[frozenset, tuple[str, ...]]:
    """The axes along which the members of each group differ, by the groups; devices by their place in a slice."""
    places, table = np.arange(math.prod(shape)).reshape(shape), dict[frozenset, tuple[str, ...]]()
    for count in range(1, places.ndim + 1):
        for dims in itertools.combinations(range(places.ndim), count):
            rest = [dim for dim in range(places.ndim) if dim not in dims]
            size = math.prod(places.shape[dim] for dim in dims)
            groups = places.transpose(*rest, *dims).reshape(-1, size).tolist()
            table.setdefault(_as_sets(groups), tuple(mesh.axis_names[dim] for dim in dims))
    return table


def _axes_of_pairs(pairs: list[list[int]], mesh: Mesh, shape: tuple[int, ...]) -> tuple[str, ...]:
    differ = {
        dim
        for source, target in pairs
        for dim in range(len(shape))
        if np.unravel_index(source, shape)[dim] != np.unravel_index(target, shape)[dim]
    }
    return tuple(mesh.axis_names[dim] for dim in sorted(differ))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _as_sets(groups: list[list[int]]) -> frozenset:
    return frozenset(frozenset(group) for group in groups)
