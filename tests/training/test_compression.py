import gzip
import random

import pytest

from dsv3_jax.training.compression import bits_per_byte


def test_noise_does_not_compress_and_repetition_does():
    noise = random.Random(0).randbytes(100_000)
    for compressor in ("zlib", "xz"):
        assert 8.0 <= bits_per_byte(compressor, noise) < 8.02
        assert bits_per_byte(compressor, b"a" * 100_000) < 0.02


def test_zlib_is_at_level_9():
    text = " ".join(str(number * number) for number in range(5000)).encode()
    gzip_bytes = len(gzip.compress(text, 9)) - 18 + 6  # the same deflate stream under the two formats' headers
    assert bits_per_byte("zlib", text) == 8 * gzip_bytes / len(text)


def test_xz_finds_repetition_beyond_the_window_of_zlib():
    block = random.Random(1).randbytes(50_000)
    assert bits_per_byte("zlib", block * 2) > 7.9
    assert bits_per_byte("xz", block * 2) < 4.1


def test_nothing_has_no_bits_per_byte():
    with pytest.raises(ValueError, match="no bytes"):
        bits_per_byte("zlib", b"")
