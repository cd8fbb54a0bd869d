"""Parameters held in FP8 as the released weights are: a code a number, a float32 scale for each block of 128 x 128.

value = code * scale, rounded to the compute type where a product takes it (V3 section 3.3.2; the weights' own kernels).
What this saves is memory, and the reading of it: products are of the compute type, on every chip.

The blocks are those of a checkpoint's matrices. Where a parameter makes several dims of one of a matrix's, as heads and
the numbers of a head do, a block ends within a head: scales are then kept for as many numbers as always share one.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from sharding.collectives import narrowed
from sharding.rules import mesh_axes

BLOCK = 128
# What an FP8 checkpoint has in another type (FACTS 2.3): whatever has one of these dims.
NOT_IN_FLOAT8 = frozenset({"gain", "vocabulary", "router_experts", "embedding_and_hidden"})
# Dims of which each number is in another block, or in another matrix, than the next.
SINGLE = frozenset({"layers", "experts", "gate_up", "heads"})
WITHIN_HEAD = frozenset({"query_key_dim", "nope_and_value_dim", "value_dim"})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Float8Blocks:
    """A parameter's value."""

    codes: Array
    """float8_e4m3fn, of the parameter's shape."""
    scales: Array
    """float32, one for each of the blocks."""
    blocks: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """How many numbers of each of the last dims share a scale; the last of them may be fewer."""

    def values(self, dtype: jnp.dtype) -> Array:
        """What they stand for, each product rounded once to float32 and once to `dtype`."""
        return narrowed(self.codes.astype(jnp.float32) * self.scales_from_dim(0), dtype)

    def scales_from_dim(self, first: int) -> Array:
        """The scales with one for each number of the dims from `first` on, in place of each block."""
        scales, shape = self.scales, self.codes.shape
        blocks = self.blocks[-len(shape) :]
        for dim in range(first, len(shape)):
            if blocks[dim] > 1:
                scales = jnp.repeat(scales, blocks[dim], axis=dim)
                scales = jax.lax.slice_in_dim(scales, 0, shape[dim], axis=dim)
        return scales

    def evenly_cut(self) -> "Float8Blocks":
        """The same numbers in blocks that divide the last dim, so that it can be laid beside another."""
        size, block = self.codes.shape[-1], self.blocks[-1]
        even = math.gcd(size, block)
        if even == block:
            return self
        scales = jnp.repeat(self.scales, block // even, axis=-1)[..., : size // even]
        return Float8Blocks(self.codes, scales, (*self.blocks[:-1], even))


def blocks_of(axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh | None) -> tuple[int, ...] | None:
    """Of a parameter with these logical axes; None: it is not held in FP8. A block ends where a device's part does."""
    if NOT_IN_FLOAT8.intersection(axes):
        return None
    return tuple(_block(axis, size, mesh) for axis, size in zip(axes, shape, strict=True))


def _block(axis: str, size: int, mesh: Mesh | AbstractMesh | None) -> int:
    if axis in SINGLE:
        return 1
    if axis in WITHIN_HEAD:
        return math.gcd(size, BLOCK)
    parts = math.prod(mesh.shape.get(one, 1) for one in mesh_axes(axis)) if mesh else 1
    return BLOCK if parts == 1 else math.gcd(size // parts, BLOCK)
