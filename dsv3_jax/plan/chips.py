"""What a chip can do, and how chips are wired: figures of https://docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e,
tpu7x), read in November 2026.

That documentation gives the interconnect as the sum over all links and both directions; here it is one direction of one
link. For v4 it gives only an all-reduce bandwidth of the whole machine, 1.1 PB/s on 4,096 chips: 270 GB/s a chip, six
links of 45 GB/s; and nothing of its data-centre network, which is taken as v5p's.
"""

from typing import NamedTuple

GIGA, TERA, GIB = 1e9, 1e12, 2**30

# A TPU multiplies bfloat16; a product of full float32 precision is made of so many.
PASSES = {"float32": 6}


class Chip(NamedTuple):
    name: str
    devices: int
    """That jax shows of one chip; the figures below are of a whole chip."""
    flops: float
    """FLOP/s of bfloat16 products."""
    memory: float
    """Bytes of HBM."""
    memory_bandwidth: float
    """Bytes/s."""
    link: float
    """Bytes/s in one direction of one of its links."""
    dims: int
    """Of its mesh or torus: it has two links a dim."""
    network: float
    """Bytes/s between machines, over the data-centre network."""
    example: str
    """A topology of it."""
    float8_flops: float | None = None
    """FLOP/s of float8 products; None: they are made of products of bfloat16."""

    def rate(self, dtype: str) -> float:
        """FLOP/s of products of this type, each of full precision."""
        return self.float8_flops or self.flops if dtype.startswith("float8") else self.flops / PASSES.get(dtype, 1)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1, 275 * TERA, 32 * GIB, 1200 * GIGA, 45 * GIGA, 3, 50 / 8 * GIGA, "v4:4x4x8"),
        Chip("v5e", 1, 197 * TERA, 16 * GIB, 819 * GIGA, 50 * GIGA, 2, 25 / 8 * GIGA, "v5e:16x16"),
        Chip("v5p", 1, 459 * TERA, 95 * GIB, 2765 * GIGA, 100 * GIGA, 3, 50 / 8 * GIGA, "v5p:4x4x8"),
        Chip("v6e", 1, 918 * TERA, 32 * GIB, 1638 * GIGA, 100 * GIGA, 2, 100 / 8 * GIGA, "v6e:16x16"),
        Chip(
            "tpu7x", 2, 2307 * TERA, 192 * GIB, 7380 * GIGA, 100 * GIGA, 3, 100 / 8 * GIGA, "tpu7x:4x4x8", 4614 * TERA
        ),
    )
}

# The longest side of a 2D torus, of two generations; of the 3D ones, whose wires are switched, a multiple of 4 closes.
WRAPS_2D = 16


def wraps(chip: Chip, size: int) -> bool:
    """Whether a dim of the machine that is this long closes to a ring."""
    return size == WRAPS_2D if chip.dims == 2 else size % 4 == 0
