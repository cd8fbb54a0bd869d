"""The devices of a TPU machine that is not here, for programs to be compiled for."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv3_jax.command_line import suggestion
from dsv3_jax.errors import ArgumentError, UserError
from dsv3_jax.plan.chips import CHIPS, Chip

# libtpu asks the machine it runs on what it is, and refuses to be loaded twice at a time: both for real TPUs only.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


class Topology(NamedTuple):
    name: str
    chip: Chip
    sides: tuple[int, ...]
    """Chips along each dim of one slice."""
    slices: int
    devices: Sequence[Any]

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.devices


def set_up_libtpu() -> None:
    """Let libtpu be loaded beside a jax that runs on the CPU. Called before jax starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    if found := importlib.util.find_spec("libtpu"):
        # Named, so that libtpu does not go by a lock file: several programs may be compiled at a time.
        (folder,) = found.submodule_search_locations or [""]
        os.environ.setdefault("TPU_LIBRARY_PATH", os.path.join(folder, "libtpu.so"))


def topology(name: str, slices: int = 1) -> Topology:
    """A machine such as "v5p:4x4x8", or several of them ("slices") joined by the data-centre network.

    Raises:
        ArgumentError: no such machine; names those there are.
        UserError: libtpu is missing, or another program holds it.
    """
    chip, sides = _read(name)
    if slices < 1:
        raise ArgumentError(f"--slices={slices} must be at least 1")
    if not importlib.util.find_spec("libtpu"):
        raise UserError("libtpu is missing, which compiles for TPUs: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":  # otherwise a chip is two devices, which programs of several chips do not use
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **options)
    except Exception as error:  # libtpu's own errors have no class in common
        said = " ".join(str(error).split())
        if "already in use" in said or "lockfile" in said:
            raise UserError(f"another program holds libtpu; wait for it or end it ({said[:200]})") from error
        raise ArgumentError(f"--topology={name} is no machine that libtpu knows: {said[:200]}") from error
    return Topology(name, chip, sides, slices, found.devices)


def _read(name: str) -> tuple[Chip, tuple[int, ...]]:
    known = ", ".join(chip.example for chip in CHIPS.values())
    parts = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    if not parts:
        raise ArgumentError(f"--topology={name} must be a chip and its sides, such as {known}")
    kind, sides = parts.group(1), tuple(map(int, parts.group(2).split("x")))
    if kind not in CHIPS:
        raise ArgumentError(
            f"--topology={name}: there is no chip {kind}{suggestion(kind, CHIPS)}; there are {', '.join(CHIPS)}"
        )
    if len(sides) != CHIPS[kind].dims or 0 in sides:
        raise ArgumentError(f"--topology={name}: {kind} needs {CHIPS[kind].dims} sides, as {CHIPS[kind].example} has")
    return CHIPS[kind], sides
