"""A compiled program's text (`compiled.as_text()`), read: its instructions, and how often each one runs."""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
"""Of element types whose name does not begin with letters and go on with their width."""

FAST_MEMORY = re.compile(r"S\([1-9]\d*\)")
"""Layouts of arrays that a TPU keeps in VMEM or scalar memory; S(0), HBM, is not written."""


class Instruction(NamedTuple):
    computation: str
    name: str
    result: str
    """Type, with its layout."""
    opcode: str
    operands: tuple[str, ...]
    """Names."""
    rest: str
    """Operands and attributes, as written."""


class Program:
    """Instructions by computation; the entry computation is called ENTRY."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in _instructions(text):
            self.computations[instruction.computation].append(instruction)

    def __iter__(self) -> Iterator[Instruction]:
        return (instruction for computation in self.computations.values() for instruction in computation)

    @functools.cached_property
    def types(self) -> dict[tuple[str, str], str]:
        """The result type of every instruction, by computation and name."""
        return {(instruction.computation, instruction.name): instruction.result for instruction in self}

    @functools.cached_property
    def users(self) -> dict[tuple[str, str], list[Instruction]]:
        """The instructions that take each as an operand, by its computation and name."""
        users = defaultdict(list)
        for instruction in self:
            for operand in set(instruction.operands):
                users[instruction.computation, operand].append(instruction)
        return users

    @functools.cached_property
    def executions(self) -> dict[str, int]:
        """How often each computation runs when the entry runs once.

        A loop whose length the text does not tell counts once, and so does each branch.
        """
        callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for instruction in self:
            times = self._trips(instruction) if instruction.opcode == "while" else 1
            for called in called_by(instruction):
                callers[called].append((instruction.computation, times))
        counted = {"ENTRY": 1}

        def count(computation: str) -> int:
            if computation not in counted:
                counted[computation] = sum(times * count(caller) for caller, times in callers[computation])
            return counted[computation]

        return defaultdict(int, {name: count(name) for name in self.computations})

    def _trips(self, loop: Instruction) -> int:
        """From what the compiler noted, or from the constant that a counter is compared with, counting from 0."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(noted.group(1))
        condition = self.computations[_attribute(loop.rest, "condition")]
        root = condition[-1]
        constants = [each for each in condition if each.opcode == "constant" and each.name in root.operands]
        if root.opcode != "compare" or "direction=LT" not in root.rest or len(constants) != 1:
            return 1
        value = re.match(r"(\d+)\)", constants[0].rest)
        return int(value.group(1)) if value else 1


def called_by(instruction: Instruction) -> list[str]:
    """Computations that an instruction names: a loop's body and condition, branches, what a fusion or a call runs."""
    called = re.findall(r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.\-]+)", instruction.rest)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest):
        called += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return called


def bytes_of(shapes: str) -> float:
    """Of all arrays in a type such as (f32[2,3]{1,0}, bf16[4])."""
    return sum(size for size, _ in arrays_of(shapes))


def slow_bytes_of(shapes: str) -> float:
    """Of those arrays that are in the main memory."""
    return sum(size for size, layout in arrays_of(shapes) if is_slow(layout))


def is_slow(layout: str) -> bool:
    """Whether an array of this layout is in the main memory."""
    return not FAST_MEMORY.search(layout)


def arrays_of(shapes: str) -> Iterator[tuple[float, str]]:
    """Bytes and layout of every array in a type."""
    for name, dims, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?", shapes):
        width = BITS[name] if name in BITS else int(re.findall(r"\d+", name)[0])
        yield width / 8 * math.prod(int(dim) for dim in dims.split(",") if dim), layout


def _instructions(text: str) -> Iterator[Instruction]:
    computation = ""
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = "ENTRY" if opened.group(1) else opened.group(2)
        elif parts := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            name, result, opcode, rest = parts.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", _in_parentheses(rest)))
            yield Instruction(computation, name, result, opcode, operands, rest)


def _in_parentheses(rest: str) -> str:
    """What stands before the parenthesis closes that was open at the start."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:place]
    return rest


def _attribute(rest: str, name: str) -> str:
    found = re.search(rf"{name}=%?([\w.\-]+)", rest)
    return found.group(1) if found else ""
