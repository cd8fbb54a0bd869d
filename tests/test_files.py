"""Files of a workdir: whole or not at all, and named where writing fails."""

import errno
import os
from pathlib import Path

import pytest

from dsv3_jax.files import naming, write_atomically


def test_a_write_makes_its_folder_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "new/folder/file"
    for text in ("é", "e"):
        write_atomically(path, text)
        assert path.read_bytes() == text.encode() and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_failed_write_names_its_file_and_leaves_the_old_one_alone(stage, tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", *([str(path)] if stage == "replace" else []))

    monkeypatch.setattr(*((os, "fsync") if stage == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_that_names_its_file_keeps_that_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path / 'inner'}'"), naming(tmp_path / "outer"):
        (tmp_path / "inner").read_text()
