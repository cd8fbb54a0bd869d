"""Rows to the devices of their experts and back, in rounds of bounded memory.

Every device sorts its rows by expert; the rows for one receiver, of all senders one after the other, are its queue. A
round takes the next `capacity` rows of every queue: sent, grouped by expert, answered, sent back. Balanced routing
needs one round; any other needs more, in the same memory, and gives the same answer. Nothing is dropped.

Rows that are `Encoded` travel as they are encoded, and their answers' gradients as a `Wire` says.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import axis_index, axis_size, largest, spread_like, variation
from sharding.encoded import Encoded, values_of, with_values, without_values
from sharding.transport import Shipment, ship

# (matrices, rows [R, D] or Encoded, along [R, ..], labels [R, ..] or None, group sizes [e]) -> answers [R, D].
# Rows past the sum of the sizes are no rows: what stands there, and what is answered, means nothing.
Answer = Callable[[Any, Array, Array, Any, Array], Array]


class Wire(NamedTuple):
    """How rows of numbers travel: as an array [M, ..] of fewer bytes, and what that stands for."""

    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]


class Queues(NamedTuple):
    """Who sends how much to whom: the same on every device. S senders, T receivers, e experts of one receiver."""

    rows_STe: Array
    """int32."""
    before_ST: Array
    """int32, place of each sender's first row in each receiver's queue."""
    first_ST: Array
    """int32, place of the first row for each receiver in what each sender holds."""

    @property
    def rows_ST(self) -> Array:
        return self.rows_STe.sum(axis=-1)


class Round(NamedTuple):
    """One round's rows at one device."""

    shipment: Shipment
    arrival_R: Array
    """int32, for each row grouped by expert, its place among the rows as they arrived."""
    group_R: Array
    """int32, the other way around."""
    group_sizes_e: Array
    """int32."""


def exchanged(
    answer: Answer,
    axes: tuple[str, ...],
    capacity: int,
    matrices: Any,
    rows_MD: Array | Encoded,
    along_M: Array,
    labels_M: Array | None,
    sizes_E: Array,
    wire: Wire | None = None,
) -> Array:
    """What the experts answer to each row: [M, D].

    Args:
        answer: the experts of one device.
        axes: mesh axes that the experts are divided over, consecutive ones on one device.
        capacity: rows a device receives in one round.
        matrices: this device's experts, what `answer` takes first; arrays and `Encoded`.
        rows_MD: rows ordered by expert; those past the sum of `sizes_E` are no rows.
        along_M: [M, ..] numbers that go along with each row.
        labels_M: [M, ..] integers that go along with each row.
        sizes_E: int32, rows of each expert of all devices.
        wire: how the gradient of the answers travels; None: as it is.

    The gradient sends the rows again, and keeps nothing but the arguments.
    """
    return _exchanged(answer, axes, capacity, wire, matrices, rows_MD, along_M, labels_M, queues_of(sizes_E, axes))


def queues_of(sizes_E: Array, axes: tuple[str, ...]) -> Queues:
    devices = axis_size(axes)
    rows_STe = jax.lax.all_gather(sizes_E, axes).reshape(devices, devices, -1)
    rows_ST = rows_STe.sum(axis=-1)
    return Queues(rows_STe, _exclusive_sum(rows_ST, 0), _exclusive_sum(rows_ST, 1))


def rounds_needed(queues: Queues, capacity: int) -> Array:
    """int32, the same on every device of the mesh: rounds until the longest queue is empty."""
    rounds = -(-queues.rows_ST.sum(axis=0).max() // capacity)
    return largest(rounds, variation(rounds))


def round_of(queues: Queues, index: Array | int, capacity: int, axes: tuple[str, ...]) -> Round:
    """The round's rows: `capacity` of every queue from the place index * capacity on."""
    me = axis_index(axes)
    rows_ST, before_ST = queues.rows_ST, queues.before_ST
    start_ST = jnp.clip(index * capacity - before_ST, 0, rows_ST)
    size_ST = jnp.clip((index + 1) * capacity - before_ST, 0, rows_ST) - start_ST
    held_ST, landed_ST = queues.first_ST + start_ST, _exclusive_sum(size_ST, 0)
    shipment = Shipment(held_ST[me], size_ST[me], landed_ST[me], landed_ST[:, me], size_ST[:, me], held_ST[:, me])
    # A part of this round's rows of one sender for one expert lies together, as it arrives and as it is grouped.
    rows_Se, start_S, stop_S = queues.rows_STe[:, me], start_ST[:, me], (start_ST + size_ST)[:, me]
    first_Se = _exclusive_sum(rows_Se, 1)
    part_Se = jnp.maximum(jnp.minimum(first_Se + rows_Se, stop_S[:, None]) - jnp.maximum(first_Se, start_S[:, None]), 0)
    part_eS = part_Se.T
    arrived_Se = _exclusive_sum(part_Se.reshape(-1), 0).reshape(part_Se.shape)
    grouped_eS = _exclusive_sum(part_eS.reshape(-1), 0).reshape(part_eS.shape)
    return Round(
        shipment,
        _moved(grouped_eS, arrived_Se.T, part_eS, capacity),
        _moved(arrived_Se, grouped_eS.T, part_Se, capacity),
        part_eS.sum(axis=1),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _exchanged(answer, axes, capacity, wire, matrices, rows_MD, along_M, labels_M, queues):
    return _forward(answer, axes, capacity, wire, matrices, rows_MD, along_M, labels_M, queues)[0]


def _forward(answer, axes, capacity, wire, matrices, rows_MD, along_M, labels_M, queues):
    def one_round(index, answers_MD):
        this = round_of(queues, index, capacity, axes)
        rows, along, labels = _received((rows_MD, along_M, labels_M), this, capacity, axes)
        return _returned(answer(matrices, rows, along, labels, this.group_sizes_e), answers_MD, this, axes)

    start = _zeros(values_of(rows_MD), matrices, rows_MD)
    answers_MD = jax.lax.fori_loop(0, rounds_needed(queues, capacity), one_round, start)
    return answers_MD, (matrices, rows_MD, along_M, labels_M, queues)


def _backward(answer, axes, capacity, wire, saved, gradient_MD):
    matrices, rows_MD, along_M, labels_M, queues = saved
    sent_MD = gradient_MD if wire is None else wire.encode(gradient_MD)

    def one_round(index, totals):
        of_matrices, of_rows_MD, of_along_M = totals
        this = round_of(queues, index, capacity, axes)
        rows, along, labels, gradient = _received((rows_MD, along_M, labels_M, sent_MD), this, capacity, axes)
        rest = without_values((matrices, rows))

        def of_values(matrices_and_rows, along):
            return answer(*with_values(rest, matrices_and_rows), along, labels, this.group_sizes_e)

        _, transpose = jax.vjp(of_values, values_of((matrices, rows)), along)
        (of_round, of_rows), of_along = transpose(gradient if wire is None else wire.decode(gradient))
        return (
            jax.tree.map(lambda total, part: total + part.astype(total.dtype), of_matrices, of_round),
            _returned(of_rows, of_rows_MD, this, axes),
            _returned(of_along, of_along_M, this, axes),
        )

    values = values_of(matrices)
    of_matrices = jax.tree.map(lambda matrix: jnp.zeros_like(matrix, jnp.float32), values)
    start = of_matrices, _zeros(values_of(rows_MD), gradient_MD), _zeros(along_M, gradient_MD)
    of_matrices, of_rows_MD, of_along_M = jax.lax.fori_loop(0, rounds_needed(queues, capacity), one_round, start)
    of_matrices = jax.tree.map(lambda total, matrix: total.astype(matrix.dtype), of_matrices, values)
    return *_as_gradients((matrices, rows_MD), (of_matrices, of_rows_MD)), of_along_M, None, None


_exchanged.defvjp(_forward, _backward)


def _received(arrays_M: Any, this: Round, capacity: int, axes: tuple[str, ...]) -> Any:
    """The round's rows of each array at this device, grouped by expert; of `Encoded` ones no values."""

    def one(rows_M: Any) -> Any:
        empty_R = _zeros(
            jax.ShapeDtypeStruct((capacity, *values_of(rows_M).shape[1:]), values_of(rows_M).dtype), rows_M
        )
        if isinstance(rows_M, Encoded):
            return Encoded(one(rows_M.encoded), empty_R)
        arrived_R = ship(rows_M, empty_R, this.shipment, axes)
        return arrived_R if this.group_sizes_e.size == 1 else arrived_R[this.arrival_R]

    return jax.tree.map(one, arrays_M, is_leaf=lambda leaf: isinstance(leaf, Encoded))


def _returned(answers_R: Array, into_M: Array, this: Round, axes: tuple[str, ...]) -> Array:
    """`into_M`, with the answers to this round's rows of this device written over it."""
    answers_R = answers_R if this.group_sizes_e.size == 1 else answers_R[this.group_R]
    return ship(answers_R, into_M, this.shipment.reversed(), axes)


def _moved(from_parts: Array, to_parts: Array, sizes: Array, capacity: int) -> Array:
    """int32 [capacity]: where each place of a run of parts, one after the other, lies in another order of them.

    Places past the last part stay where they are.
    """
    place_R = jnp.arange(capacity)
    begin, to = from_parts.reshape(-1), to_parts.reshape(-1)
    part_R = jnp.searchsorted(begin + sizes.reshape(-1), place_R, side="right", method="compare_all")
    part_R = jnp.minimum(part_R, begin.shape[0] - 1)
    return jnp.where(place_R < sizes.sum(), to[part_R] + place_R - begin[part_R], place_R)


def _as_gradients(arguments: Any, of_values: Any) -> Any:
    """Gradients of arguments some of which are `Encoded`: what is read has none."""

    def one(argument: Any, gradient: Array) -> Any:
        return Encoded(None, gradient) if isinstance(argument, Encoded) else gradient

    return jax.tree.map(one, arguments, of_values, is_leaf=lambda leaf: isinstance(leaf, Encoded))


def _zeros(rows: Any, *others: Any) -> Array:
    """Zeros like the rows, each device's own along every axis that the rows or the others vary along."""
    return spread_like(jnp.zeros_like(rows), *jax.tree.leaves(others))


def _exclusive_sum(sizes: Array, axis: int) -> Array:
    return jnp.cumsum(sizes, axis=axis) - sizes
