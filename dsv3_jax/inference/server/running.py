"""A server that runs: its socket, its threads, and its clean end."""

import signal
import socket
import threading
import traceback
from typing import Any

import uvicorn

from dsv3_jax.errors import ArgumentError
from dsv3_jax.inference.server.app import make_app
from dsv3_jax.inference.server.service import Service

SECONDS_TO_END = 3
"""What runs when the server is asked to end has so long for it."""
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


def run(service: Service, engine: Any, listening: socket.socket) -> None:
    """Serve on a socket that is bound, until SIGINT or SIGTERM or the engine fails."""
    server = Server(service)
    stop = threading.Event()

    def run_engine() -> None:
        try:
            engine.run(stop)
        except Exception:
            traceback.print_exc()
            service.fail("the engine has failed; the server's log tells more")
            server.should_exit = True

    worker = threading.Thread(target=run_engine, name="engine")
    # uvicorn raises the signals that it got once more when it has ended: they have done what they should.
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    worker.start()
    try:
        server.run(sockets=[listening])
    finally:
        stop.set()
        worker.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    if service.failure is not None:
        raise SystemExit(1)


class Server(uvicorn.Server):
    """Says where it listens, once it does."""

    def __init__(self, service: Service, seconds_to_end: int = SECONDS_TO_END):
        app = make_app(service)
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=seconds_to_end)
        )
        self._name = service.name

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or []:
            host, port = listening.getsockname()[:2]
            print(f"{self._name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
