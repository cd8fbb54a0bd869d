"""Work that a killed process leaves half done and the next one goes on with."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.errors import UserError
from dsv3_jax.files import naming

JOURNAL = "finished.jsonl"
# TensorStore reports a full disk as ValueError or RuntimeError: "RESOURCE_EXHAUSTED: Error writing ...".
OF_TENSORSTORE = re.compile("[A-Z_]+: ")


class PartialFolder:
    """The folder a result grows in, OUT.partial, with a journal of what is complete; renamed to OUT at the end.

    A unit is written to the journal when everything of it is on disk, so half a unit never counts.
    """

    def __init__(self, out: Path, identity: Any):
        """Begin, or go on with what another process began from the same `identity` (anything that JSON holds).

        Raises:
            ConversionError: `out` exists, or what was begun there was another conversion.
        """
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConversionError(f"{out} exists: give a new folder, or remove it")
        self.out, self.path = out, partial_of(out)
        self._journal = self.path / JOURNAL
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.finished: set[str] = self._units(_line(digest))
        """Units that are complete."""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """No other process writes meanwhile, and what fails becomes one line that says what is kept.

        Raises:
            ConversionError: another process does, or what is within raises an error of the disk.
        """
        try:
            with self._journal.open("rb") as file:
                _lock(file, self.path)
                yield
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            if not isinstance(error, OSError) and not OF_TENSORSTORE.match(str(error)):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConversionError(
                f"cannot write {self.path}: {reason}; what was complete is kept, and the same command goes on from "
                "there"
            ) from error

    def finish(self, unit: str) -> None:
        """Note a unit whose files are all on disk."""
        self._append(_line(unit))
        self.finished.add(unit)

    def complete(self) -> None:
        """Give the folder its name."""
        if self.out.exists():
            self.out.rmdir()  # empty, or the constructor had refused it
        self.path.replace(self.out)
        (self.out / JOURNAL).unlink()  # last: without it nobody would know that the folder is complete
        _sync(self.out.parent)

    def _append(self, line: bytes) -> None:
        with naming(self._journal), self._journal.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _units(self, first: bytes) -> set[str]:
        """What the journal says is complete, its first line being this one. The last may have been cut, and goes."""
        content = self._journal.read_bytes() if self._journal.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        others = [path for path in self.path.iterdir() if path != self._journal] if self.path.exists() else []
        try:
            if not whole.startswith(first) and (others or not first.startswith(content)):
                raise ValueError
            units = {json.loads(line) for line in whole.splitlines()[1:]}
        except ValueError:
            raise ConversionError(
                f"{self.path} is what another conversion left (another source, or a source that has changed): remove it"
            ) from None
        with naming(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if whole != content:
            os.truncate(self._journal, len(whole))
        if not whole:
            self._append(first)
        return units


def _lock(file: IO[bytes], folder: Path) -> None:
    """Until the file is closed or the process has ended, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConversionError(f"another process writes {folder}: wait for it, or end it") from None
    except OSError as error:  # on some network disks
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise


def _line(text: str) -> bytes:
    return json.dumps(text).encode() + b"\n"


def run_units(
    units: Iterable[tuple[str, Iterable[Callable[[], None]]]], workers: int, finished: Callable[[str], None]
) -> None:
    """Run every task of every unit in threads, and say when the last task of a unit is done.

    Units overlap, so that the end of one does not leave threads idle; of tasks only a few wait at a time. The first
    error ends it: what runs is waited for, the rest is not begun.
    """
    waiting: deque[tuple[str, Future[None] | None]] = deque()

    def settle(most: int) -> None:
        while len(waiting) > most:
            unit, future = waiting.popleft()
            if future is None:
                finished(unit)
            else:
                future.result()

    with ThreadPoolExecutor(workers) as pool:
        try:
            for unit, tasks in units:
                for task in tasks:
                    waiting.append((unit, pool.submit(task)))
                    settle(2 * workers)
                waiting.append((unit, None))
            settle(0)
        finally:
            pool.shutdown(cancel_futures=True)


def partial_of(out: Path) -> Path:
    """The folder that a result grows in."""
    return out.with_name(out.name + ".partial")


def require_space(out: Path, size: int) -> None:
    """Raise ConversionError where the disk of `out` has not so many bytes left, less those that are written already."""
    written = sum(file.stat().st_blocks * 512 for file in partial_of(out).rglob("*") if file.is_file())
    needed, free = size - written, free_space(out)
    if free < needed:
        raise ConversionError(
            f"{out} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left: free some, or choose "
            "another disk"
        )


def free_space(out: Path) -> int:
    return shutil.disk_usage(on_disk(out)).free


def on_disk(out: Path) -> Path:
    """The folder above `out` that exists."""
    existing = out.resolve()
    while not existing.is_dir():
        existing = existing.parent
    return existing


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
