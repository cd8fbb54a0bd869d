"""What a compiled program says of its collectives: kind, mesh axes, bytes, how often."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"

BITS = {"pred": 8, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}
"""Of element types whose name does not end in their width."""


class Collective(NamedTuple):
    kind: str
    axes: tuple[str, ...]
    """Mesh axes whose devices take part together."""
    times: int
    """Executions in one run of the program. A loop of unknown length counts once, and so does each branch."""
    bytes_sent: float
    """What one device sends over the wires in one execution, in a ring: its own part stays."""


class Instruction(NamedTuple):
    computation: str
    result: str
    opcode: str
    rest: str
    """Operands and attributes."""


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """Every collective of a compiled program's text (`compiled.as_text()`) that was compiled for this mesh."""
    instructions = list(_instructions(hlo))
    executions, groups_of = _executions(instructions), _axes_by_groups(mesh)
    found = []
    for instruction in instructions:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            axes = _axes(instruction.rest, mesh, groups_of)
            bytes_sent = _bytes_sent(instruction, kind, math.prod(mesh.shape[axis] for axis in axes))
            found.append(Collective(kind, axes, executions[instruction.computation], bytes_sent))
    return found


def _instructions(hlo: str) -> Iterator[Instruction]:
    computation = ""
    for line in hlo.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = "ENTRY" if opened.group(1) else opened.group(2)
        elif parts := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            yield Instruction(computation, *parts.groups())


def _executions(instructions: list[Instruction]) -> dict[str, int]:
    """How often each computation runs when the entry runs once."""
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for instruction in instructions:
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest)
        for called in re.findall(r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.\-]+)", instruction.rest):
            callers[called].append((instruction.computation, int(trips.group(1)) if trips else 1))
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest):
            for called in branches.split(","):
                callers[called.strip().lstrip("%")].append((instruction.computation, 1))
    counted = {"ENTRY": 1}

    def count(computation: str) -> int:
        if computation not in counted:
            counted[computation] = sum(times * count(caller) for caller, times in callers[computation])
        return counted[computation]

    return defaultdict(int, {name: count(name) for name in {each.computation for each in instructions}})


def _bytes_sent(instruction: Instruction, kind: str, devices: int) -> float:
    size = _bytes(instruction.result)
    if instruction.opcode == "all-gather-start":  # its result is operand and result together
        size *= devices / (devices + 1)
    elif instruction.opcode.endswith("-start"):
        size /= 2
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        size *= devices
    return size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def _bytes(shapes: str) -> float:
    """Of all arrays in a type such as (f32[2,3]{1,0}, bf16[4])."""
    total = 0.0
    for name, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shapes):
        width = BITS.get(name) or int(re.findall(r"\d+", name)[0])
        total += width / 8 * math.prod(int(dim) for dim in dims.split(",") if dim)
    return total


def _axes(attributes: str, mesh: Mesh, axes_by_groups: dict[frozenset, tuple[str, ...]]) -> tuple[str, ...]:
    """From replica_groups={{0,1},{2,3}}, [2,2]<=[2,2]T(1,0) or mesh['data'=2,'fsdp'=2] {'fsdp'}, or from pairs."""
    if named := re.search(r"replica_groups=mesh\[.*?\] \{(.*?)\}", attributes):
        names = re.findall(r"'(\w+)'", named.group(1))
        return tuple(axis for axis in mesh.axis_names if axis in names)
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, order = counted.groups()
        ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
        groups = (ids.transpose(_numbers(order)) if order else ids).reshape(_numbers(shape)).tolist()
        return axes_by_groups[_as_sets(groups)]
    listed = re.search(r"(replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}", attributes)
    if not listed:
        raise ValueError(f"no devices named in {attributes}")
    groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed.group(2))]
    return axes_by_groups[_as_sets(groups)] if listed.group(1) == "replica_groups" else _axes_of_pairs(groups, mesh)


def _axes_by_groups(mesh: Mesh) -> dict[frozenset, tuple[str, ...]]:
    """The axes along which the members of each group differ, by the groups; devices by their place in the mesh."""
    places, table = np.arange(mesh.size).reshape(mesh.devices.shape), {}
    for count in range(1, places.ndim + 1):
        for dims in itertools.combinations(range(places.ndim), count):
            rest = [dim for dim in range(places.ndim) if dim not in dims]
            size = math.prod(places.shape[dim] for dim in dims)
            groups = places.transpose(*rest, *dims).reshape(-1, size).tolist()
            table[_as_sets(groups)] = tuple(mesh.axis_names[dim] for dim in dims)
    return table


def _axes_of_pairs(pairs: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    shape = mesh.devices.shape
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
