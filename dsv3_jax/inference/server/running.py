"""A server that runs: its socket, its threads, and its clean end."""

import asyncio
import math
import signal
import socket
import threading
import traceback

import uvicorn

from dsv3_jax.errors import ArgumentError
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.server.app import make_app
from dsv3_jax.inference.server.service import Service

SECONDS_TO_END = 3
"""What runs when the server is asked to end has so long for it; then it is told that the server stops."""
SECONDS_TO_TELL = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bound(host: str, port: int) -> socket.socket:
    """A socket of this address; port 0 is any that is free.

    Raises:
        ArgumentError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ArgumentError(f"--host={host} --port={port} cannot be had: {error.strerror}") from error
    return listening


def run(service: Service, engine: Engine, listening: socket.socket) -> None:
    """Serve on a socket that is bound, until SIGINT or SIGTERM or the engine fails."""
    stop = threading.Event()
    server = Server(service, stop)

    def run_engine() -> None:
        try:
            engine.run(stop)
        except Exception:
            traceback.print_exc()
            service.fail("the engine has failed; the server's log tells more")
            server.should_exit = True

    # A daemon: who interrupts a second time does not wait for what it is compiling.
    worker = threading.Thread(target=run_engine, name="engine", daemon=True)
    # uvicorn has handlers of its own while it runs, and raises what they got once more when it has ended: so nothing
    # that comes before them is lost, and nothing that comes after ends the program with an error.
    before = {number: signal.signal(number, server.handle_exit) for number in SIGNALS}
    worker.start()
    try:
        server.run(sockets=[listening])
    finally:
        stop.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        worker.join()
    if service.failure is not None:
        raise SystemExit(1)


class Server(uvicorn.Server):
    """Says where it listens, once it does, and at its end sets `stop`, which ends the engine and what waits for it."""

    def __init__(self, service: Service, stop: threading.Event, seconds_to_end: float = SECONDS_TO_END):
        app, at_most = make_app(service), math.ceil(seconds_to_end) + SECONDS_TO_TELL
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=at_most))
        self._name, self._stop, self._seconds = service.name, stop, seconds_to_end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or []:
            host, port = listening.getsockname()[:2]
            print(f"{self._name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._seconds, self._stop.set)
        await super().shutdown(sockets)
