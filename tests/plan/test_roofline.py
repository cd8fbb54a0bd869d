"""Least times against arithmetic by hand, on machines made of coordinates."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax.plan.chips import CHIPS, GIGA
from dsv3_jax.plan.collectives import Collective
from dsv3_jax.plan.roofline import Times, seconds_of, times
from dsv3_jax.plan.topology import Topology


def _machine(name: str, *sides: int, slices: int = 1) -> Topology:
    chip = CHIPS[name]
    places = itertools.product(range(slices), *map(range, sides), range(chip.devices))
    devices = [SimpleNamespace(coords=place[1:-1], slice_index=place[0]) for place in places]
    return Topology(f"{name}:{'x'.join(map(str, sides))}", chip, sides, slices, devices)


def _mesh(machine: Topology, **axes: int) -> Mesh:
    """Only what the times need of a mesh: jax's own refuses devices that are none."""
    devices = np.array(machine.devices, dtype=object).reshape(tuple(axes.values()))
    return SimpleNamespace(axis_names=tuple(axes), shape=axes, devices=devices)


def _gathered(machine: Topology, axes: dict[str, int], over: tuple[str, ...], sent: float) -> tuple[float, bool]:
    return seconds_of(Collective("all-gather", over, 2, sent), _mesh(machine, **axes), machine)


def test_a_ring_sends_both_ways_and_a_torus_along_all_its_dims():
    machine = _machine("v5p", 4, 4, 8)
    link = 100 * GIGA
    assert _gathered(machine, {"fsdp": 16, "expert": 8}, ("expert",), 1e9) == (pytest.approx(2e9 / (2 * link)), False)
    whole = _gathered(machine, {"fsdp": 16, "expert": 8}, ("fsdp", "expert"), 1e9)
    assert whole == (pytest.approx(2e9 / (6 * link)), False)


def test_half_a_dim_is_a_line_and_two_chips_have_one_link():
    machine = _machine("v5p", 4, 4, 8)
    assert _gathered(machine, {"data": 32, "expert": 4}, ("expert",), 1e9)[0] == pytest.approx(2e9 / (100 * GIGA))
    assert _gathered(machine, {"data": 64, "expert": 2}, ("expert",), 1e9)[0] == pytest.approx(2e9 / (100 * GIGA))


def test_of_a_2d_torus_only_the_whole_machine_closes():
    for side, links in ((8, 1), (16, 2)):
        machine = _machine("v6e", side, side)
        found = _gathered(machine, {"data": side, "fsdp": side}, ("fsdp",), 1e9)[0]
        assert found == pytest.approx(2e9 / (links * 100 * GIGA))


def test_an_all_to_all_is_bound_by_the_middle_of_the_longest_dim():
    """4 x 4 x 8 chips that send each other 1 byte: 64 x 64 bytes cross the middle of the 8, either way, on 16 rings."""
    machine = _machine("v5p", 4, 4, 8)
    mesh = _mesh(machine, expert=128)
    found, _ = seconds_of(Collective("ragged-all-to-all", ("expert",), 1, 127.0), mesh, machine)
    # A ring is cut in two places; half of each device's bytes go to the other half, over 2 * 16 links each way.
    assert found == pytest.approx(64 * 64 / 32 / (100 * GIGA))


def test_two_devices_of_one_chip_share_its_links_and_meet_in_its_memory():
    machine = _machine("tpu7x", 4, 4, 4)
    inside = _gathered(machine, {"data": 64, "fsdp": 2}, ("fsdp",), 1e9)[0]
    assert inside == pytest.approx(2e9 / (7380 * GIGA / 2))
    ring = _gathered(machine, {"data": 16, "fsdp": 4, "tensor": 2}, ("fsdp",), 1e9)[0]
    assert ring == pytest.approx(2e9 / (2 * 100 * GIGA / 2))


def test_between_slices_it_is_the_network():
    machine = _machine("v5p", 4, 4, 4, slices=2)
    axes = {"data": 2, "fsdp": 64}
    seconds, crosses = _gathered(machine, axes, ("data",), 1e9)
    assert crosses and seconds == pytest.approx(2e9 / (50 / 8 * GIGA))
    assert not _gathered(machine, axes, ("fsdp",), 1e9)[1]


def test_times_of_a_program_and_what_bounds_it():
    machine = _machine("v5p", 4, 4, 4)
    mesh = _mesh(machine, fsdp=4, expert=16)
    gather = Collective("all-gather", ("fsdp",), 1, 2e9)
    found = times({"bfloat16": 459e12, "float32": 459e12 / 6}, 2765e9, [gather], mesh, machine)
    assert found == Times(pytest.approx(2.0), pytest.approx(1.0), pytest.approx(0.01), 0.0)
    assert found.bound == "products" and found.overlapped == 2.0 and found.in_turn == pytest.approx(3.01)


def test_products_of_fp8_have_a_rate_of_their_own_where_a_chip_has_them():
    rates = {name: chip.rate("float8_e4m3fn") / chip.rate("bfloat16") for name, chip in CHIPS.items()}
    assert rates == {"v4": 1, "v5e": 1, "v5p": 1, "v6e": 1, "tpu7x": 2}
    machine = _machine("tpu7x", 4, 4, 4)
    found = times({"float8_e4m3fn": 4614e12, "bfloat16": 2307e12}, 0.0, [], _mesh(machine, fsdp=128), machine)
    assert found.products == pytest.approx(4.0)  # a chip is two devices
