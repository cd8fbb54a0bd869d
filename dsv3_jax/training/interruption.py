"""SIGTERM and SIGINT as a question the training loop asks between steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """`with catch_signals() as interrupted:` makes the first SIGTERM or SIGINT turn `interrupted()` true.

    The loop then saves and stops. A second SIGINT raises KeyboardInterrupt where it arrives, for whoever will not wait.
    The handlers before are back on exit. Main thread only, as Python demands.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
