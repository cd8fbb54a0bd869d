"""A conversion that was killed, or found the disk full, is gone on with: what was done is kept, and nothing else."""

import fcntl
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import infer
from dsv3_jax.convert import exporting, importing
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.exporting import export_checkpoint
from dsv3_jax.convert.importing import SMALL, import_checkpoint
from dsv3_jax.convert.resumable import JOURNAL, PartialFolder
from dsv3_jax.convert.safetensors_header import read_header
from tests.reference.hf_checkpoint import fabricate
from tests.reference.hf_folder import Folder


class Ended(NamedTuple):
    out: Path
    code: int
    errors: str


ROOT = Path(infer.__file__).parent
SHARD_BYTES = {"shard_bytes": 300_000}
# When each process is killed, and how many units are complete then.
KILLS = {
    "import": {
        "before Orbax is done": (["rename", 0], 0),
        "arrays half made": (["rmtree", 7], 0),
        "before the first file": (["finish", 1], 1),
        "after two files": (["finish", 3], 3),
        "in a file": (["convert", 40], None),
        "in the texts": (["replace", 0], 5),
        "before the name": (["complete", 0], 5),
    },
    "export": {
        "before the first file": (["finish", 0], 0),
        # Its only block: at a later one, another thread may have finished it.
        "in the first file": (["write", 0], 0),
        "after two files": (["finish", 2], 2),
        "in a file": (["write", 70], None),
        "before the name": (["complete", 0], None),
    },
}
FULL = [("import", "disk full"), ("export", "disk full")]
CASES = [(function, case) for function, cases in KILLS.items() for case in cases]
FUNCTIONS: dict[str, Any] = {"import": import_checkpoint, "export": export_checkpoint}
OPTIONS = {"import": {}, "export": SHARD_BYTES}


@pytest.fixture(scope="module")
def source(tiny_model, tmp_path_factory) -> Path:
    """Four files, the last with the largest tensor."""
    path = tmp_path_factory.mktemp("source")
    model = tiny_model(vocabulary=2000, width=132, dense_ffn_width=260, mtp_depth=0)
    fabricate(path, model, dtype="fp8", shards=4, scales_in_other_shard=True)
    folder = Folder(path)
    folder.put("lm_head.weight", folder.tensor("lm_head.weight").to(torch.float32))
    return path


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, Path]:
    """What a process makes that nothing ends."""
    path = tmp_path_factory.mktemp("whole")
    for function, convert in FUNCTIONS.items():
        convert(source, path / function, **OPTIONS[function])
    return {function: path / function for function in FUNCTIONS}


@pytest.fixture(scope="module")
def ended(source, tmp_path_factory) -> dict[tuple[str, str], Ended]:
    """Each of CASES, and of FULL, run until it ended."""
    path = tmp_path_factory.mktemp("ended")
    calls, outs = [], []
    for function, case in (*CASES, *FULL):
        at = KILLS[function][case][0] if case in KILLS[function] else ["limit", 800_000]
        outs.append(path / str(len(outs)))
        calls.append([[function, str(source), str(outs[-1]), OPTIONS[function]], at])
    command = [sys.executable, "-m", "tests.convert.interrupt", json.dumps(calls)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    results = zip(outs, json.loads(done.stdout), strict=True)
    return dict(zip((*CASES, *FULL), (Ended(out, *result) for out, result in results), strict=True))


def require_same(out: Path, expected: Path) -> None:
    """The same files of the same bytes, but for the times that Orbax notes."""
    files = {file.relative_to(expected) for file in expected.rglob("*") if file.is_file()}
    assert {file.relative_to(out) for file in out.rglob("*") if file.is_file()} == files
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
    for file in files:
        if file.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            assert filecmp.cmp(out / file, expected / file, shallow=False), file


@pytest.fixture
def converted(monkeypatch) -> set[str]:
    """Tensors that are converted from now on."""
    names: set[str] = set()
    convert, write = importing._Import._convert, exporting._write_block

    def importing_block(self, array, leaf, index, block):
        names.add(leaf.tensor(index))
        convert(self, array, leaf, index, block)

    def exporting_block(output, *others):
        names.add(output.name)
        write(output, *others)

    monkeypatch.setattr(importing._Import, "_convert", importing_block)
    monkeypatch.setattr(exporting, "_write_block", exporting_block)
    return names


def matrices_of(file: Path) -> set[str]:
    return {name for name, info in read_header(file).items() if len(info.shape) > 1 and not name.endswith("_scale_inv")}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_killed_conversion_is_gone_on_with(case, ended, source, whole, converted):
    function, (out, code, errors) = case[0], ended[case]
    assert code == -signal.SIGKILL, errors
    partial = out.with_name(out.name + ".partial")
    assert not out.exists()
    finished = {json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()[1:]}
    units = KILLS[function][case[1]][1]
    assert units is None or len(finished) == units
    if case[1] == "in a file":
        assert finished - {SMALL} and len(finished) < 5
    if function == "export":
        for file in partial.glob("*.safetensors"):
            assert filecmp.cmp(file, whole["export"] / file.name, shallow=False)
        assert finished <= {file.name for file in partial.glob("*.safetensors")}
    FUNCTIONS[function](source, out, **OPTIONS[function])
    require_same(out, whole[function])
    assert not partial.exists()
    files = source if function == "import" else whole["export"]
    left = {file.name for file in files.glob("*.safetensors")} - finished
    matrices = {name for file in left for name in matrices_of(files / file)}
    assert converted & {name for file in files.glob("*.safetensors") for name in matrices_of(file)} == matrices


@pytest.mark.parametrize("case", FULL, ids=" ".join)
def test_a_disk_that_fills_up(case, ended, source, whole, converted):
    function, (out, code, errors) = case[0], ended[case]
    assert code == 1 and "Traceback" not in errors
    last = errors.replace("\r", "\n").splitlines()[-1]
    assert last.startswith(f"error: cannot write {out}.partial: ") and "File too large" in last
    assert last.endswith("what was complete is kept, and the same command goes on from there")
    partial = out.with_name(out.name + ".partial")
    finished = {json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()[1:]} - {SMALL}
    assert finished
    assert not list(partial.glob("*.tmp"))
    FUNCTIONS[function](source, out, **OPTIONS[function])
    require_same(out, whole[function])
    files = source if function == "import" else whole["export"]
    assert not converted & {name for file in finished for name in matrices_of(files / file)}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_source_that_has_changed_is_refused(function, source, tmp_path, monkeypatch):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(source, copy)
    monkeypatch.setattr(PartialFolder, "complete", lambda self: None)
    FUNCTIONS[function](copy, out, **OPTIONS[function])
    file = copy / "model-00003-of-00004.safetensors"
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConversionError, match=f"{out}.partial is what .* left .*has changed.*remove it"):
        FUNCTIONS[function](copy, out, **OPTIONS[function])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    FUNCTIONS[function](copy, out, **OPTIONS[function])


def test_a_journal_counts_whole_lines(tmp_path):
    out, journal = tmp_path / "out", tmp_path / "out.partial" / JOURNAL
    folder = PartialFolder(out, ["a"])
    for unit in ("one", "two"):
        folder.finish(unit)
    whole = journal.read_text()
    first = whole.index("\n")
    for cut in (0, 1, first, first + 1, first + 3, len(whole) - 6, len(whole) - 1):
        journal.write_text(whole[:cut])
        folder = PartialFolder(out, ["a"])
        assert folder.finished == {unit for unit in ("one", "two") if f'"{unit}"\n' in whole[:cut]}
        folder.finish("three")
        folder.finish("two")
        assert PartialFolder(out, ["a"]).finished == folder.finished
        with pytest.raises(ConversionError, match="another conversion"):
            PartialFolder(out, ["b"])


@pytest.mark.parametrize("content", ["text\n", "[1]\n", "\x00\x00\n", '"digest"\n"one"\n'])
def test_a_journal_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / JOURNAL).write_text(content)
    with pytest.raises(ConversionError, match=f"{tmp_path / 'out.partial'} is what another conversion left"):
        PartialFolder(tmp_path / "out", ["a"])
    assert (tmp_path / "out.partial" / JOURNAL).read_text() == content


@pytest.mark.parametrize("function", FUNCTIONS)
def test_two_processes_do_not_write_one_result(function, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(PartialFolder, "complete", lambda self: None)
    FUNCTIONS[function](source, out, **OPTIONS[function])
    with (tmp_path / "out.partial" / JOURNAL).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match=f"another process writes {out}.partial: wait for it, or end it"):
            FUNCTIONS[function](source, out, **OPTIONS[function])
    FUNCTIONS[function](source, out, **OPTIONS[function])


@pytest.mark.parametrize("fails", ["unlink", "rmdir", "replace"])
def test_a_result_that_cannot_get_its_name_is_not_lost(fails, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    folder = PartialFolder(out, ["a"])
    (folder.path / "result").write_text("text")
    folder.finish("one")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, fails, interrupt)
        folder.complete()
    if not (out / "result").exists():
        again = PartialFolder(out, ["a"])
        assert again.finished == {"one"}
        again.complete()
    assert (out / "result").read_text() == "text" and not folder.path.exists()
