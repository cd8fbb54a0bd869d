"""What of a program fills a device's memory."""

import math
import re
from typing import Any, NamedTuple

import jax

from dsv3_jax.plan.hlo import Program, slow_bytes_of
from dsv3_jax.plan.traffic import CONTROL, FREE, outside_of_fusions


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: float
    temporary: float
    peak: float
    """The most at one time, arguments included."""


class Buffer(NamedTuple):
    bytes: float
    """Of one."""
    results: int
    """Of this size and origin in the program's text; not all exist at one time."""
    shape: str
    origin: str
    """The operation that makes it, as jax names it."""


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    found: Any = compiled.memory_analysis()
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, found.peak_memory_in_bytes)


def bytes_by_part(tree: Any) -> dict[str, float]:
    """Bytes a device has of each field of a tuple of arrays (ShapeDtypeStructs with shardings)."""
    return {
        name: sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(getattr(tree, name))
        )
        for name in tree._fields
    }


def largest_buffers(program: Program, most: int = 8) -> list[Buffer]:
    """The largest results in main memory, by shape and origin."""
    found: dict[tuple[str, str], Buffer] = {}
    for computation in outside_of_fusions(program):
        for each in program.computations[computation]:
            size = slow_bytes_of(each.result)
            if each.opcode in FREE | CONTROL or each.result.startswith("(") or not size:
                continue
            shape, origin = each.result.partition("{")[0], _origin(each.rest) or each.opcode
            before = found.get((shape, origin))
            found[shape, origin] = Buffer(size, before.results + 1 if before else 1, shape, origin)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:most]


def _origin(attributes: str) -> str:
    """The last names of an operation's path, without those that every one has."""
    named = re.search(r'op_name="([^"]*)"', attributes)
    if not named:
        return ""
    dull = re.compile(r"jit\(.*\)|shard_map|jvp\(.*\)|transpose\(.*\)|while|body|closed_call|checkpoint|.*computation")
    parts = [part for part in named.group(1).split("/") if not dull.fullmatch(part)]
    return ("gradient: " if "transpose(" in named.group(1) else "") + "/".join(parts[-2:])
