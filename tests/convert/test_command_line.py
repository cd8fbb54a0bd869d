"""python -m dsv3_jax.convert: what is asked for, every mistake as one line, and how a process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import infer
from dsv3_jax.command_line import run_main
from dsv3_jax.convert.__main__ import WORKERS, Export, Import, Inspect, main, parse
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.resumable import require_space
from dsv3_jax.errors import ArgumentError
from tests.reference.hf_checkpoint import fabricate

ROOT = Path(infer.__file__).parent


@pytest.fixture(scope="module")
def good(tiny_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good")
    fabricate(path, tiny_model(), dtype="bf16", shards=2)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code, stdout and stderr of a command in this process."""

    def command(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *argv])
        with pytest.raises(SystemExit) as caught:
            run_main(main)
        return caught.value.code, *capsys.readouterr()

    return command


def test_what_is_asked_for():
    a, b = Path("a"), Path("b")
    assert parse(["import", "a", "b"]) == Import(a, b, WORKERS)
    assert (
        parse(["import", "a", "--workers", "3", "b"]) == parse(["import", "--workers=3", "a", "b"]) == Import(a, b, 3)
    )
    assert parse(["export", "a", "b"]) == Export(a, b, None, None, False, WORKERS)
    options = ["--dtype=fp8", "--scale-format", "ue8m0", "--no-mtp"]
    assert parse(["export", *options, "a", "b"]) == Export(a, b, "fp8", "ue8m0", True, WORKERS)
    assert parse(["export", "a", *options, "b"]) == parse(["export", "a", "b", *options])
    assert parse(["export", "a", "b", "--dtype=bf16", "--dtype=f32"]).dtype == "f32"
    assert parse(["inspect", "a"]) == Inspect(a)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["a command is missing", "import, export, inspect"]),
        ("imprt a b", ["'imprt' is no command (did you mean import?)", "import, export, inspect"]),
        ("convert a b", ["'convert' is no command"]),
        ("import", ["import needs HF_DIR OUT: HF_DIR is missing"]),
        ("import a", ["import needs HF_DIR OUT: OUT is missing"]),
        ("import a b c", ["import needs HF_DIR OUT: 'c' is too many"]),
        ("export a", ["export needs CHECKPOINT OUT: OUT is missing"]),
        ("inspect", ["inspect needs DIR: DIR is missing"]),
        ("import a b -w", ["'-w' is no folder", "--name=value"]),
        ("import a b --wrkers=2", ["--wrkers is not an option of import (did you mean --workers?)"]),
        ("export a b --scale-fmt=ue8m0", ["--scale_fmt is not an option of export (did you mean --scale_format?)"]),
        ("import a b --dtype=fp8", ["--dtype is not an option of import; --help"]),
        ("inspect a --workers=2", ["--workers is not an option of inspect"]),
        ("import a --workers", ["--workers needs a value: expected int"]),
        ("import a b --workers=two", ["--workers=two cannot be read: expected int"]),
        ("import a b --workers=0", ["--workers=0 must be at least 1"]),
        ("export a b --workers=-3", ["--workers=-3 must be at least 1"]),
        ("export a b --dtype=fp9", ["--dtype=fp9 cannot be read: expected one of fp8, bf16, f32 or None"]),
        ("export a b --scale_format=x", ["cannot be read: expected one of float32, ue8m0 or None"]),
        ("export a b --no-mtp=maybe", ["--no_mtp=maybe cannot be read: expected True or False"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(line, parts, capsys):
    with pytest.raises(ArgumentError) as caught:
        parse(line.split())
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    for part in parts:
        assert part in message, message
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--help"], ["import ", "export ", "inspect ", "HF_DIR OUT"]),
        (["import", "--help"], ["HF_DIR OUT", "--workers", "FP8 stays FP8"]),
        (["export", "a", "-h"], ["CHECKPOINT OUT", "--dtype", "fp8,bf16,f32", "--scale_format", "--no_mtp"]),
        (["inspect", "--help"], ["DIR", "what is missing or left over"]),
    ],
)
def test_help(argv, parts, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert caught.value.code == 0
    for part in parts:
        assert part in shown, shown


def test_a_mistake_ends_with_2(run):
    assert run("import", "a", "b", "--workers=0") == (2, "", "error: --workers=0 must be at least 1\n")
    assert run("imports", "a", "b")[0] == run("export", "a")[0] == 2


@pytest.mark.parametrize("command", ["import", "export", "inspect"])
def test_what_is_no_folder_with_a_model(command, run, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("absent", "file", "empty"):
        folders = [str(tmp_path / name)] + ([str(tmp_path / "out")] if command != "inspect" else [])
        code, out, errors = run(command, *folders)
        assert (code, out) == (1, "")
        assert errors.startswith(f"error: {tmp_path / name} ") and errors.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize("command", ["import", "export"])
def test_what_is_in_the_way_is_kept(command, run, good, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("text")
    code, _, errors = run(command, str(good), str(out))
    assert code == 1 and errors == f"error: {out} exists: give a new folder, or remove it\n"
    (out / "mine").rename(tmp_path / "file")
    code, _, errors = run(command, str(good), str(tmp_path / "file"))
    assert code == 1 and errors == f"error: {tmp_path / 'file'} exists: give a new folder, or remove it\n"
    assert (tmp_path / "file").read_text() == "text"
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine").write_text("text")
    code, _, errors = run(command, str(good), str(out))
    assert code == 1 and errors.startswith(f"error: {partial} is what another conversion left")
    assert [path.name for path in partial.iterdir()] == ["mine"] and not any(out.iterdir())
    partial.joinpath("mine").unlink()
    assert run(command, str(good), str(out))[0] == 0
    assert any(out.iterdir()) and not partial.exists()


@pytest.mark.parametrize("command", ["import", "export"])
def test_another_conversion_is_not_gone_on_with(command, run, good, tmp_path, monkeypatch, tiny_model):
    fabricate(tmp_path / "other", tiny_model(vocabulary=50), dtype="bf16")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    monkeypatch.setattr("dsv3_jax.convert.resumable.PartialFolder.complete", lambda self: None)
    assert run(command, str(tmp_path / "other"), str(out))[0] == 0
    before = {path: path.stat().st_mtime_ns for path in partial.rglob("*")}
    code, _, errors = run(command, str(good), str(out))
    assert code == 1 and f"error: {partial} is what another conversion left" in errors and "remove it" in errors
    assert {path: path.stat().st_mtime_ns for path in partial.rglob("*")} == before


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_disk_that_is_too_small_is_known_before(command, run, good, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_jax.convert.resumable.free_space", lambda out: 10_000)
    code, _, errors = run(command, str(good), str(tmp_path / "out"))
    assert code == 1
    assert errors.splitlines()[-1].startswith(f"error: {tmp_path / 'out'} needs 0.00 GB and its disk has 0.00 GB left")
    assert not any(tmp_path.iterdir())


def test_what_is_written_already_needs_no_room(good, tmp_path, monkeypatch):
    require_space(tmp_path / "out", size := 3 * 10**6)
    monkeypatch.setattr("dsv3_jax.convert.resumable.free_space", lambda out: 2 * 10**6)
    with pytest.raises(ConversionError, match="needs 0.00 GB"):
        require_space(tmp_path / "out", size)
    (tmp_path / "out.partial" / "state").mkdir(parents=True)
    (tmp_path / "out.partial" / "state" / "chunk").write_bytes(bytes(1_500_000))
    require_space(tmp_path / "out", size)
    with pytest.raises(ConversionError):
        require_space(tmp_path / "out", size + 10**6)


def test_what_a_process_says_and_how_it_ends(good, tmp_path):
    def start(*argv: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "dsv3_jax.convert", *argv]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\x80\x02.")
    refused = start("inspect", str(tmp_path / "bad"))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    done = start("import", str(good), str(tmp_path / "out"))
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.startswith("reads ") and "memory about" in done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: python infer.py")
