"""What of a program fills a device's memory."""

import math
from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: float
    temporary: float
    peak: float
    """The most at one time, arguments included."""


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
