"""Headers that lie: each is refused in one line, and none costs memory."""

import json
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch

from dsv3_jax.convert.safetensors_header import DTYPES, LARGEST_HEADER, SafetensorsError, read_header

GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F8_E4M3", "shape": [5], "data_offsets": [24, 29]},
    "none": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [24, 24]},
    "one": {"dtype": "I64", "shape": [], "data_offsets": [29, 37]},
}
DATA = bytes(37)


def encoded(header: object, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def refusal(tmp_path) -> Callable[[bytes], str]:
    """What `read_header` says of a file of these bytes, without the path."""

    def read(content: bytes) -> str:
        path = tmp_path / "f.safetensors"
        path.write_bytes(content)
        with pytest.raises(SafetensorsError) as caught:
            read_header(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1 and len(message) < 1000
        return message.removeprefix(f"{path}: ")

    return read


def test_a_good_header_comes_in_the_order_of_the_bytes(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(encoded(dict(reversed(GOOD.items()))))
    header = read_header(path)
    assert list(header) == ["a", "none", "b", "one"]
    begin = path.stat().st_size - len(DATA)
    for name, info in header.items():
        assert {"dtype": info.dtype, "shape": list(info.shape)} == {key: GOOD[name][key] for key in ("dtype", "shape")}
        assert [info.begin - begin, info.end - begin] == GOOD[name]["data_offsets"]


def test_a_file_of_no_tensors_is_read(tmp_path):
    (tmp_path / "f").write_bytes(encoded(b"{}      ", b""))
    assert read_header(tmp_path / "f") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes, too few"),
        (b"1234567", "it has 7 bytes, too few"),
        (bytes(8), "its header begins with b'', need '{'"),
        (struct.pack("<Q", 1 << 63) + b"{}", f"its header would be {1 << 63} bytes, need at most {LARGEST_HEADER}"),
        (struct.pack("<Q", LARGEST_HEADER + 1) + b"{}", "need at most"),
        (struct.pack("<Q", LARGEST_HEADER) + b"{}", "but 2 follow: the file is cut short"),
        (struct.pack("<Q", 3) + b"{}", "its header would be 3 bytes, but 2 follow"),
        (struct.pack("<Q", 1) + b"{}", "the header is not valid JSON"),
        (encoded(b" {}"), "its header begins with b' ', need '{'"),
        (encoded(b"[]"), "its header begins with b'[', need '{'"),
        (encoded(b'{"\xff": 1}'), "the header is not UTF-8 at byte 2"),
        (encoded(b'{"a": }'), "the header is not valid JSON: Expecting value"),
        (encoded(b'{} {"a": 1}'), "the header is not valid JSON: Extra data"),
        (encoded(b'{"a": ' + b"[" * 200_000), "the header is nested too deep"),
        (encoded(b'{"a": ' + b"9" * 100_000 + b"}"), "the header is not valid JSON: Exceeds the limit"),
        (encoded(b'{"a": 1, "b": 2, "a": 3}'), "the header has 'a' twice"),
        (encoded(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "the header has 'dtype' twice"),
        (encoded(b'{"__metadata__": {"x": "1", "x": "2"}}'), "the header has 'x' twice"),
        (encoded({"__metadata__": {"format": 1}}), "__metadata__ is {'format': 1}, need an object of strings"),
        (encoded({"__metadata__": "pt"}), "__metadata__ is 'pt', need an object of strings"),
        (encoded({"a\nb": {}}), "tensor 'a\\nb': need a name of printable characters"),
        (encoded(b'{"\\ud800": {}}'), "tensor '\\ud800': need a name of printable characters"),
    ],
)
def test_bytes_that_are_no_header_are_refused(content, message, refusal):
    assert message in refusal(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (1, "tensor 'b' is 1, need an object of data_offsets, dtype, shape"),
        ({"dtype": "F32", "shape": []}, "need an object of data_offsets, dtype, shape"),
        ({**GOOD["b"], "stride": 1}, "need an object of data_offsets, dtype, shape"),
        ({**GOOD["b"], "dtype": "F4"}, f"tensor 'b' has dtype 'F4', need one of {', '.join(DTYPES)}"),
        ({**GOOD["b"], "dtype": []}, "has dtype [], need one of"),
        ({**GOOD["b"], "shape": 5}, "tensor 'b' has shape 5, need sizes"),
        ({**GOOD["b"], "shape": [-5]}, "has shape [-5], need sizes"),
        ({**GOOD["b"], "shape": [-5, -1]}, "has shape [-5, -1], need sizes"),
        ({**GOOD["b"], "shape": [5, True]}, "has shape [5, True], need sizes"),
        ({**GOOD["b"], "shape": [5.0]}, "has shape [5.0], need sizes"),
        ({**GOOD["b"], "shape": [float("nan")]}, "has shape [nan], need sizes"),
        ({**GOOD["b"], "shape": ["5"]}, "has shape ['5'], need sizes"),
        ({**GOOD["b"], "shape": [1 << 63]}, "need sizes"),
        ({**GOOD["b"], "shape": [10**4000]}, "need sizes"),
        ({**GOOD["b"], "shape": [1 << 32, 1 << 32, 0]}, "need sizes"),
        ({**GOOD["b"], "shape": [1] * 65}, "need sizes"),
        ({**GOOD["b"], "shape": [1 << 40]}, "tensor 'b' has 5 bytes, need 1099511627776 for F8_E4M3"),
        ({**GOOD["b"], "dtype": "BF16"}, "tensor 'b' has 5 bytes, need 10 for BF16 [5]"),
        ({**GOOD["b"], "data_offsets": [24]}, "has data_offsets [24], need [begin, end]"),
        ({**GOOD["b"], "data_offsets": [24, 29, 30]}, "has data_offsets [24, 29, 30], need [begin, end]"),
        ({**GOOD["b"], "data_offsets": [29, 24]}, "has data_offsets [29, 24], need [begin, end]"),
        ({**GOOD["b"], "data_offsets": [-5, 0]}, "has data_offsets [-5, 0], need [begin, end]"),
        ({**GOOD["b"], "data_offsets": [24.0, 29]}, "has data_offsets [24.0, 29], need [begin, end]"),
        ({**GOOD["b"], "data_offsets": [24, 28]}, "tensor 'b' has 4 bytes, need 5 for F8_E4M3 [5]"),
        ({**GOOD["b"], "data_offsets": [23, 28]}, "tensor 'b' overlaps tensor 'a' by 1 bytes"),
        ({**GOOD["b"], "data_offsets": [25, 30]}, "1 bytes between tensor 'none' and tensor 'b' are in no tensor"),
        ({**GOOD["b"], "data_offsets": [0, 5]}, "tensor 'a' overlaps tensor 'b' by 5 bytes"),
        ({**GOOD["b"], "data_offsets": [1 << 62, (1 << 62) + 5]}, "tensor 'none' and tensor 'one' are in no tensor"),
    ],
)
def test_entries_that_lie_are_refused(change, message, refusal):
    assert message in refusal(encoded({**GOOD, "b": change}))


def test_a_file_cut_short_says_how_much_is_missing_and_bytes_too_many_are_refused(refusal):
    assert refusal(encoded(GOOD, DATA[:-3])).startswith("3 of ")
    assert "bytes are missing: the file is cut short" in refusal(encoded(GOOD, b""))
    assert refusal(encoded(GOOD, DATA + b"12")) == "2 bytes after tensor 'one' are in no tensor"
    assert refusal(encoded({}, b"12")) == "2 bytes after the header are in no tensor"
    hole = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}
    assert refusal(encoded(hole, b"12")) == "1 bytes between the header and tensor 'a' are in no tensor"


def test_long_and_deep_values_are_told_in_brief(refusal):
    deep = b"[" * 300 + b"]" * 300
    refusal(encoded(b'{"a": ' + deep + b"}"))
    refusal(encoded(b'{"__metadata__": ' + deep + b"}"))
    refusal(encoded({"n" * 100_000: {"dtype": "x" * 100_000, "shape": [1] * 100_000, "data_offsets": []}}))
    refusal(encoded({"n" * 100_000: {"dtype": "U8", "shape": [1] * 100_000, "data_offsets": []}}))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SafetensorsError, match=f"{path}: there is no such file"):
            read_header(path)


def test_pickles_are_named_and_never_opened(tmp_path, refusal):
    class Dangerous:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    for protocol in range(2, 6):
        assert "a pickle, which can run code when read" in refusal(pickle.dumps(Dangerous(), protocol))
        assert "a pickle, which can run code when read" in refusal(pickle.dumps(1, protocol))
    for zipped in (True, False):
        torch.save({"a": torch.ones(3)}, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
        assert "pickle" in refusal((tmp_path / "model.bin").read_bytes())
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("a", "b")
    assert "zip of pickles" in refusal((tmp_path / "model.zip").read_bytes())
    assert not (tmp_path / "ran").exists()


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    path, text = tmp_path / "f", b"{}" + b" " * (0x280 - 2)
    path.write_bytes(encoded(text, b""))
    assert path.read_bytes()[:2] == b"\x80\x02" and read_header(path) == {}


def test_a_pointer_of_git_lfs_is_named(refusal):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5234139343\n"
    assert "git lfs pull" in refusal(pointer)


def test_any_mutation_is_read_or_refused_in_little_memory(tmp_path):
    chosen, path = random.Random(0), tmp_path / "f"
    hostile = [
        None,
        True,
        -1,
        0,
        1,
        24,
        2**31,
        2**63,
        2**64,
        10**300,
        1.5,
        "",
        "F32",
        "a" * 1000,
        [],
        [[]],
        {},
        [0, 24],
    ]
    accepted = 0

    def mutated() -> bytes:
        header = json.loads(json.dumps(GOOD))
        if chosen.random() < 0.5:
            entry = header[chosen.choice(list(header))]
            for _ in range(chosen.randint(1, 2)):
                entry[chosen.choice([*entry, "x"])] = chosen.choice(hostile)
        content = bytearray(encoded(header))
        if chosen.random() < 0.3:
            content[:8] = chosen.choice(
                [chosen.getrandbits(64), 1 << chosen.randrange(64), chosen.randrange(500)]
            ).to_bytes(8, "little")
        for _ in range(chosen.randint(0, 3)):
            start = chosen.randrange(len(content))
            stop = start + chosen.choice([0, 1, 1, 1, 8, 50])
            content[start:stop] = chosen.choice([b"", b"\x00", b'"', b"}", b"{", b"9", bytes(content[start:stop]) * 2])
        return bytes(content)

    tracemalloc.start()
    try:
        for _ in range(4000):
            content = mutated()
            path.write_bytes(content)
            try:
                tensors = read_header(path)
            except SafetensorsError as error:
                assert len(str(error)) < 1000 and len(str(error).splitlines()) == 1
                continue
            accepted += 1
            assert sum(info.size for info in tensors.values()) == len(content) - 8 - int.from_bytes(
                content[:8], "little"
            )
            assert len(safetensors.deserialize(content)) == len(tensors)
        assert 50 < accepted < 2000 and tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
