"""What a device's main memory holds when it holds most.

A compiled program is in the order in which it runs. Going through it, an array begins where an instruction makes it and
ends with its last use; what stands in another one's place, such as the result of an update of a part, is that array.
The compiler's own accounting is not part of the text: five ways to compile DeepSeek-V3's step came within 1% of it.
"""

import re
from collections import defaultdict
from typing import NamedTuple

from dsv3_jax.plan.hlo import Instruction, Program, arrays_of, called_by, is_slow
from dsv3_jax.plan.traffic import CONTROL, PASSED_ON, place_of

SAME_ARRAYS = {"bitcast", "while", "add-dependency", "optimization-barrier"}
IN_PLACE = {"dynamic-update-slice": 0, "ragged-all-to-all": 1}
"""Which operand the result stands in the place of."""
OVERWRITES = {"fusion", "add", "multiply", "convert", "select", "copy"}
"""May write over an operand of the same size that is used for the last time."""


class Array(NamedTuple):
    """One that exists at the peak."""

    bytes: float
    shape: str
    origin: str
    """The operation that made it, as jax names it, or the argument."""


class Peak(NamedTuple):
    bytes: float
    arrays: list[Array]
    """The largest first."""


def peak_of(program: Program) -> Peak:
    found = _Walk(program, "ENTRY").peak()
    return Peak(found.bytes, sorted(found.arrays, key=lambda array: -array.bytes))


class _Walk:
    """Through one computation. Arrays have numbers; arguments of the program are there from the start."""

    def __init__(self, program: Program, computation: str):
        self.program, self.instructions = program, program.computations[computation]
        self.sizes: list[float] = []
        self.counted: list[float] = []
        """The size where it is this computation's to count: a loop's arguments are held by who runs it."""
        self.makers: list[tuple[Instruction, str]] = []
        self.arrays: dict[str, list[int]] = {}
        for instruction in self.instructions:
            self.arrays[instruction.name] = self._arrays_of(instruction, computation == "ENTRY")
        last = {}
        for time, instruction in enumerate(self.instructions):
            # Taking one array out of a tuple uses no other.
            used = () if instruction.opcode == "get-tuple-element" else instruction.operands
            for name in (*used, instruction.name):
                last.update(dict.fromkeys(self.arrays.get(name, []), time))
        last.update(dict.fromkeys(self.arrays[self.instructions[-1].name], len(self.instructions)))
        self.ending = defaultdict(list)
        for array, time in last.items():
            self.ending[time].append(array)

    def peak(self) -> Peak:
        live: dict[int, None] = {}
        most = Peak(0.0, [])
        for time, instruction in enumerate(self.instructions):
            new = [array for array in self.arrays[instruction.name] if array not in live]
            if instruction.opcode in OVERWRITES:
                for array in new:
                    over = (old for old in self.ending[time] if old in live and self.sizes[old] == self.sizes[array])
                    if (old := next(over, None)) is not None:
                        self.counted[array] = self.counted[old]
                        del live[old]
            live.update(dict.fromkeys(new))
            inside = Peak(0.0, [])
            if instruction.opcode in CONTROL:
                peaks = [_Walk(self.program, called).peak() for called in called_by(instruction)]
                inside = max(peaks, key=lambda peak: peak.bytes)
            total = sum(self.counted[array] for array in live) + inside.bytes
            if total > most.bytes:
                most = Peak(total, [self._described(array) for array in live if self.counted[array]] + inside.arrays)
            for array in self.ending[time]:
                live.pop(array, None)
        return most

    def _arrays_of(self, instruction: Instruction, is_entry: bool) -> list[int]:
        opcode, given = instruction.opcode, [self.arrays.get(name, []) for name in instruction.operands]
        if opcode in SAME_ARRAYS:
            return given[0]
        if opcode == "tuple":
            return [array for arrays in given for array in arrays]
        if opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", instruction.rest)
            return given[0][int(index.group(1)) :][:1] if index else []
        if opcode in IN_PLACE:
            return given[IN_PLACE[opcode]]
        if opcode.endswith("-done"):
            return given[0][:1]
        types = list(arrays_of(instruction.result))
        if opcode.endswith("-start"):  # the result, then what it comes from and what keeps track
            types = types[:1]
        places = _places_in_fusion(instruction, self.program) if opcode == "fusion" else {}
        arrays = []
        for number, (size, layout) in enumerate(types):
            if number in places and given[places[number]]:
                arrays.append(given[places[number]][0])
                continue
            arrays.append(len(self.sizes))
            self.sizes.append(size if is_slow(layout) else 0.0)
            self.counted.append(self.sizes[-1] if is_entry or opcode != "parameter" else 0.0)
            self.makers.append((instruction, re.findall(r"\w+\[[\d,]*\]", instruction.result)[number]))
        return arrays

    def _described(self, array: int) -> Array:
        instruction, shape = self.makers[array]
        return Array(self.counted[array], shape, _origin(instruction) or instruction.opcode)


def _places_in_fusion(fusion: Instruction, program: Program) -> dict[int, int]:
    """Which of a fusion's results stand in the place of which operand: those that update a part of it."""
    inside = {each.name: each for each in program.computations[called_by(fusion)[0]]}
    root = next(reversed(inside.values()))
    places = {}
    for number, result in enumerate(root.operands if root.opcode == "tuple" else [root.name]):
        made = _before(inside[result], inside)
        if made.opcode == "fusion":
            inner = _places_in_fusion(made, program).get(0)
            updated = None if inner is None else inside[made.operands[inner]]
        else:
            updated = inside[made.operands[0]] if made.opcode == "dynamic-update-slice" else None
        if updated and (source := _before(updated, inside)).opcode == "parameter":
            places[number] = place_of(source)
    return places


def _before(instruction: Instruction, inside: dict[str, Instruction]) -> Instruction:
    """What is passed on, unchanged in size."""
    while instruction.opcode in PASSED_ON and instruction.operands[0] in inside:
        instruction = inside[instruction.operands[0]]
    return instruction


def _origin(instruction: Instruction) -> str:
    """The last names of an operation's path, without those that every one has."""
    named = re.search(r'op_name="([^"]*)"', instruction.rest)
    if not named:
        return ""
    path = named.group(1).replace("\\'", "'")
    if instruction.opcode == "parameter":
        return re.sub(r"\['(\w+)'\]", r".\1", path)
    dull = re.compile(r"jit\(.*\)|shard_map|jvp\(.*\)|transpose\(.*\)|while|body|closed_call|checkpoint|.*computation")
    parts = [part for part in path.split("/") if not dull.fullmatch(part)]
    return ("gradient: " if "transpose(" in path else "") + "/".join(parts[-2:])
