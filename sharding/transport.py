"""Rows from device to device, as many from each to each as they have: one contract, the transport chosen here."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import axis_size, largest, variation
from sharding.mesh import platform


class Shipment(NamedTuple):
    """What this device sends to each of n others, itself among them, and gets from each; int32 [n], in rows.

    All six must agree between the devices: what one sends to another is what the other gets from it.
    """

    send_offset: Array
    """First row for each receiver, in what this device sends."""
    send_size: Array
    landing_offset: Array
    """Where those rows land, in what the receiver gets."""
    receive_offset: Array
    """Where the rows of each sender land, in what this device gets."""
    receive_size: Array
    origin_offset: Array
    """First of those rows, in what the sender sends."""

    def reversed(self) -> "Shipment":
        """The way back."""
        return Shipment(
            self.receive_offset,
            self.receive_size,
            self.origin_offset,
            self.send_offset,
            self.send_size,
            self.landing_offset,
        )


def ship(rows: Array, into: Array, shipment: Shipment, axes: Sequence[str]) -> Array:
    """`into`, with the rows that other devices along the axes send to this one written over it.

    `rows` [.., trailing dims] and `into` [.., the same trailing dims] may differ in length. Every device calls this.
    """

    if not _has_ragged():
        return _padded(rows, into, shipment, tuple(axes))
    return jax.lax.ragged_all_to_all(
        rows,
        into,
        shipment.send_offset,
        shipment.send_size,
        shipment.landing_offset,
        shipment.receive_size,
        axis_name=tuple(axes),
    )


def _has_ragged() -> bool:
    """Whether the backend has a ragged all-to-all. XLA:CPU has none, and libtpu 0.0.42 refuses it for more v5e chips
    than the eight of one host: "not supported in limited ICI routing settings"."""
    mesh = jax.sharding.get_abstract_mesh()
    is_v5e = mesh.abstract_device is not None and mesh.abstract_device.device_kind == "TPU v5 lite"
    return platform() != "cpu" and not (is_v5e and mesh.size > 8)


def _padded(rows: Array, into: Array, shipment: Shipment, axes: tuple[str, ...]) -> Array:
    """The same by all-to-alls of equal buckets, as many as the largest part needs; together a bucket a device are no
    more than `into`, so that memory does not depend on who sends to whom."""
    devices = axis_size(axes)
    height = max(1, math.ceil(into.shape[0] / devices))
    steps = largest(-(-shipment.send_size.max() // height), variation(shipment.send_size))

    def step(index: Array, into: Array) -> Array:
        place = index * height + jnp.arange(height)
        taken = shipment.send_offset[:, None] + place
        buckets = jax.lax.all_to_all(rows[jnp.minimum(taken, rows.shape[0] - 1)], axes, 0, 0)
        landed = jnp.where(place < shipment.receive_size[:, None], shipment.receive_offset[:, None] + place, len(into))
        return into.at[landed].set(buckets, mode="drop")

    return jax.lax.fori_loop(0, steps, step, into)
