"""What a conversion will take, said before it starts: bytes, memory, time."""

import contextlib
import os
import time
from pathlib import Path

from dsv3_jax.convert.resumable import free_space, on_disk
from dsv3_jax.convert.sources import CACHED_CHUNKS
from dsv3_jax.convert.state import BLOCK_BYTES

PROBE_BYTES = 64 * 2**20
IDLE_BYTES = 500 * 10**6
"""What Python with the libraries takes."""


def memory(workers: int) -> int:
    """Bytes of memory of a conversion, about, whatever the checkpoint's size."""
    # A block as read, as numbers of four times the bytes, and as written.
    return IDLE_BYTES + CACHED_CHUNKS + workers * 6 * BLOCK_BYTES


def projected(read: int, write: int, out: Path, workers: int) -> str:
    """One line; takes the time of writing 64 MiB to the disk of `out`, where there is more than that to write."""
    sizes = f"reads {in_words(read)}, writes {in_words(write)} to {out} ({in_words(free_space(out))} free)"
    needs = f"memory about {in_words(memory(workers))} with {workers} threads"
    if write <= PROBE_BYTES:
        return f"{sizes}; {needs}"
    rate = write_rate(on_disk(out))
    return f"{sizes}; {needs}; at the {rate / 1e6:,.0f} MB/s that this disk takes: {duration(write / rate)}"


def write_rate(folder: Path) -> float:
    """Bytes a second that the disk of a folder takes, flushed."""
    probe = folder / f".write-rate-{os.getpid()}"
    block = os.urandom(PROBE_BYTES)
    start = time.perf_counter()
    try:
        with probe.open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return PROBE_BYTES / (time.perf_counter() - start)


def in_words(size: int) -> str:
    """Bytes in GB or MB, of 10^9 and 10^6."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
