"""The least time a program can take: its products, its memory traffic, its collectives, each at a chip's full rate.

Real steps take longer. What the four times are good for is which of them is largest, and what utilisation no tuning of
this layout on these chips could pass. Collectives are taken to have their links to themselves.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dsv3_jax.plan.chips import Chip, wraps
from dsv3_jax.plan.collectives import Collective
from dsv3_jax.plan.topology import Topology


class Times(NamedTuple):
    """Seconds a device is busy in one run of the program."""

    products: float
    memory: float
    links: float
    network: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        """All at once."""
        return max(self)

    @property
    def in_turn(self) -> float:
        """One after the other."""
        return sum(self)


def times(
    flops: dict[str, float], traffic: float, collectives: Sequence[Collective], mesh: Mesh, machine: Topology
) -> Times:
    """Of a device's FLOPs by type, its bytes from and to main memory, and its collectives."""
    chip = machine.chip
    products = sum(number / (chip.rate(dtype) / chip.devices) for dtype, number in flops.items())
    links = network = 0.0
    for each in collectives:
        seconds, crosses = seconds_of(each, mesh, machine)
        links, network = links + seconds * (not crosses), network + seconds * crosses
    return Times(products, traffic / (chip.memory_bandwidth / chip.devices), links, network)


def seconds_of(collective: Collective, mesh: Mesh, machine: Topology) -> tuple[float, bool]:
    """What all its executions take, and whether they go over the network between slices."""
    chip, members = machine.chip, _members(collective.axes, mesh)
    sent = collective.bytes_sent * collective.times
    slices = len({getattr(device, "slice_index", 0) for device in members})
    if slices > 1:
        # Of what a device sends, the part for other slices leaves its own, whichever way the rest goes.
        share = (
            1.0 if "all-to-all" not in collective.kind else (slices - 1) / slices * len(members) / (len(members) - 1)
        )
        return sent * share / (chip.network / chip.devices), True
    extents = [len({device.coords[dim] for device in members}) for dim in range(len(machine.sides))]
    spans = [(size, size == side and wraps(chip, side)) for size, side in zip(extents, machine.sides, strict=True)]
    spans = [(size, closed) for size, closed in spans if size > 1]
    if not spans:  # the devices of one chip
        return sent / (chip.memory_bandwidth / chip.devices), False
    rate = chip.link / chip.devices
    if "all-to-all" in collective.kind:
        # Everybody sends everybody as much: through the middle of the longest dim goes half of it all.
        whole = sent * len(members) / (len(members) - 1)
        return max(whole * size / (8 if closed else 4) for size, closed in spans) / rate, False
    return sent / (rate * sum(2 if closed else 1 for _, closed in spans)), False


def _members(axes: tuple[str, ...], mesh: Mesh) -> list[Any]:
    """The devices of the first group that these axes join."""
    first = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    return list(mesh.devices[first].flat)


def utilisation(model_flops: float, seconds: float, chip: Chip) -> float:
    """Share of a device's bfloat16 rate that the model's own FLOPs are, in so many seconds."""
    return model_flops / (chip.flops / chip.devices) / seconds if seconds else math.nan
