"""What a conversion tells while it runs."""

import sys
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from dsv3_jax.training.progress import note


class Observer(Protocol):
    def note(self, text: str) -> None:
        """One line that the user should read."""

    def plan(self, read: int, write: int, out: Path, workers: int) -> None:
        """So many bytes will be read, and written to `out`; nothing speaks against it, and nothing of it is done."""

    def begin(self, total: int, done: int) -> None:
        """So many bytes are to be converted, so many of them were, by a process before this one."""

    def advance(self, count: int) -> None:
        """So many more bytes are converted; from any thread."""

    def end(self) -> None:
        """All are, or no more will be."""


class Silent:
    """Says nothing: for use as a library."""

    def note(self, text: str) -> None:
        pass

    def plan(self, read: int, write: int, out: Path, workers: int) -> None:
        pass

    def begin(self, total: int, done: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def end(self) -> None:
        pass


class Bar(Silent):
    """Lines and a bar with bytes, rate and time left, on stderr."""

    def note(self, text: str) -> None:
        note(text)

    def begin(self, total: int, done: int) -> None:
        self._bar = tqdm(
            total=total, initial=done, unit="B", unit_scale=True, file=sys.stderr, mininterval=0.5, smoothing=0.05
        )

    def advance(self, count: int) -> None:
        with self._bar.get_lock():
            self._bar.update(count)

    def end(self) -> None:
        self._bar.close()
