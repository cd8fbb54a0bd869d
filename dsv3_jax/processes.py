"""Several processes, one run: joined at the start, agreed on the configuration, and stopped when one of them dies."""

import contextlib
import glob
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.config import Config, ConfigError, from_json, to_json
from dsv3_jax.errors import ArgumentError
from dsv3_jax.training.resume import differences

FAREWELL = b"\x00"


@dataclass(frozen=True)
class ProcessArguments:
    """Of a run of several processes. On TPU pods, under SLURM, Open MPI and Kubernetes they are found without these."""

    coordinator: str | None = None
    """HOST:PORT at which every process reaches process 0."""
    count: int | None = None
    """Processes in the run."""
    index: int | None = None
    """Which of them this one is, from 0."""


def join_processes(arguments: ProcessArguments, config: Config) -> None:
    """Make this process one of its run's, where the run has several.

    Raises:
        ArgumentError: some of the three arguments are missing, or do not fit each other.
        ConfigError: another process was given another configuration; names the field and both values.
    """
    given = (arguments.coordinator, arguments.count, arguments.index)
    if any(value is not None for value in given):
        _check(arguments)
        jax.distributed.initialize(*given)
    elif launched_by(os.environ):
        jax.distributed.initialize()
    if jax.process_count() > 1:
        _agree(config)
        _watch((arguments.coordinator or socket.gethostname()).partition(":")[0])


def launched_by(environment: Mapping[str, str]) -> str | None:
    """What has started this process as one of several; None where nothing says so."""
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "TPU"
    if glob.glob("/dev/accel[0-9]*") and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return "TPU"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        # jax asks Kubernetes for the other pods of the job through this package.
        return "Kubernetes" if importlib.util.find_spec("kubernetes") else None
    return None


def is_first_process() -> bool:
    """Whether this process writes what a run has one of: its files and its words."""
    return jax.process_index() == 0


def on_any_process(flag: bool) -> bool:
    """Whether it is true of any process. All call this at the same step."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def everyones_text(text: str) -> list[str]:
    """The text of every process, in their order. All call this."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(own)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(own)] = own
    return [
        bytes(row[:length]).decode()
        for row, length in zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    ]


def _check(arguments: ProcessArguments) -> None:
    for name in ("coordinator", "count", "index"):
        if getattr(arguments, name) is None:
            raise ArgumentError(f"--process.{name} is missing: --process.coordinator, count and index go together")
    host, _, port = (arguments.coordinator or "").rpartition(":")
    if not host or not port.isdecimal():
        raise ArgumentError(f"--process.coordinator={arguments.coordinator} must be HOST:PORT")
    if arguments.count is None or arguments.count < 1:
        raise ArgumentError(f"--process.count={arguments.count} must be at least 1")
    if arguments.index is None or not 0 <= arguments.index < arguments.count:
        raise ArgumentError(f"--process.index={arguments.index} must be from 0 to {arguments.count - 1}")


def _agree(config: Config) -> None:
    configs = [from_json(text) for text in everyones_text(to_json(config))]
    for index, other in enumerate(configs):
        for name, first, found in differences(configs[0], other):
            raise ConfigError(f"{name}: process 0 has {first!r}, process {index} {found!r}; all need one value")


# jax notices after a minute or two that a process has gone, and then ends the others by a stack trace. A connection
# that every process keeps to process 0 tells at once.


def _watch(first_host: str) -> None:
    """Stop this process, with one line, as soon as another one has gone without a farewell."""
    if jax.process_index() == 0:
        server = socket.create_server(("", 0))
        everyones_text(f"{first_host}:{server.getsockname()[1]}")
        for _ in range(jax.process_count() - 1):
            connection, _ = server.accept()
            index = int.from_bytes(connection.recv(4), "big")
            _watch_one(connection, index)
    else:
        host, _, port = everyones_text("")[0].rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        connection.settimeout(None)
        connection.sendall(jax.process_index().to_bytes(4, "big"))
        _watch_one(connection, 0)


def _watch_one(connection: socket.socket, index: int) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    _connections.append(connection)

    def wait() -> None:
        try:
            said = connection.recv(1)
        except OSError:
            said = b""
        if said != FAREWELL and connection in _connections:
            print(
                f"error: process {index} of {jax.process_count()} has stopped, so this one does; "
                "the same command goes on from the last checkpoint",
                flush=True,
                file=sys.stderr,
            )
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_connections: list[socket.socket] = []


def several_processes() -> bool:
    """Whether others notice how this process ends."""
    return bool(_connections)


def leave_processes() -> None:
    """Tell the others that this process ends as it should."""
    while _connections:
        with contextlib.suppress(OSError):  # it has ended already
            _connections.pop().sendall(FAREWELL)


def end_process(code: int) -> NoReturn:
    """Exit; of several processes at once, for the ordinary exit waits for the others, which may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if several_processes():
        os._exit(code)
    sys.exit(code)
