"""How far ordinary compressors get on the same bytes: the baseline for a language model's bits per byte."""

import lzma
import zlib
from typing import Literal


def bits_per_byte(compressor: Literal["zlib", "xz"], data: bytes) -> float:
    """Compressed bits per byte of `data`, all of it as one stream: zlib level 9, or xz -9 with its container.

    Raises:
        ValueError: `data` is empty.
    """
    if not data:
        raise ValueError("bits per byte of no bytes")
    compressed = {"zlib": lambda: zlib.compress(data, 9), "xz": lambda: lzma.compress(data, preset=9)}[compressor]()
    return 8 * len(compressed) / len(data)
