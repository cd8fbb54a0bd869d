"""The command line: every spelling of an option, and one line for every mistake."""

import dataclasses
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from configs.tiny import config as tiny
from dsv3_jax.command_line import config_names, parse_train, run_main
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.errors import ArgumentError, UserError


def test_a_config_alone_is_its_file_and_its_name_the_workdir():
    arguments = parse_train(["--config=tiny"])
    assert (arguments.config, arguments.config_name) == (tiny, "tiny")
    assert (arguments.workdir, arguments.init) == (Path("runs/tiny"), None)


@pytest.mark.parametrize("name", config_names())
def test_every_config_file_parses_and_checks(name):
    assert parse_train(["--config", name]).config_name == name


@pytest.mark.parametrize(
    "argv",
    [
        ["--training.batch_size=4", "--config=tiny"],
        ["--config=tiny", "--training.batch-size=4"],
        ["--config", "tiny", "--training.batch_size", "4"],
        ["--config=tiny", "--training.batch-size", "4"],
        ["--config=tiny", "--training.batch_size=2", "--training.batch-size=4"],
    ],
)
def test_spellings_of_one_option(argv):
    expected = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, batch_size=4))
    assert parse_train(argv).config == expected


def test_values_of_every_kind():
    argv = "--workdir=/a/b --init c --seed=7 --model.query_latent=None --data.isolate_documents=True --data.path=x=y"
    arguments = parse_train(
        ["--config=tiny", *argv.split(), "--optimizer.learning_rate=1e-4", "--training.tokens=9_000_000"]
    )
    config = arguments.config
    assert (arguments.workdir, arguments.init) == (Path("/a/b"), Path("c"))
    assert (config.seed, config.model.query_latent, config.data.isolate_documents) == (7, None, True)
    assert (config.data.path, config.optimizer.learning_rate, config.training.tokens) == ("x=y", 1e-4, 9_000_000)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["--config=NAME", "tiny", "v3_671b"]),
        (["--config=tny"], ["tny", "did you mean tiny?", "v3_671b"]),
        (["--config=tiny", "--training.toke=3"], ["--training.toke ", "did you mean --training.tokens?"]),
        (["--config=tiny", "--width=3"], ["did you mean --model.width?"]),
        (["--config=tiny", "--wrokdir=x"], ["did you mean --workdir?"]),
        (["--config=tiny", "--zzzzzz=3"], ["--zzzzzz is not an option; "]),
        (["--config=tiny", "--training.tokens=lots"], ["--training.tokens=lots", "expected int"]),
        (["--config=tiny", "--model.query_latent=none"], ["--model.query_latent=none", "int or None"]),
        (["--config=tiny", "--model.score_function=relu"], ["relu", "one of sigmoid, softmax"]),
        (["--config=tiny", "--data.isolate_documents"], ["--data.isolate_documents needs a value", "True or False"]),
        (["--config=tiny", "--seed", "--workdir=x"], ["--seed needs a value"]),
        # Made a path, it would be a folder named gs: in the current one, on every worker its own.
        (["--config=tiny", "--workdir=gs://bucket/run"], ["--workdir=gs://bucket/run is no folder", "mount"]),
        (["--config=tiny", "--init=gs://bucket/run"], ["--init=gs://bucket/run is no folder", "mount"]),
        (["--config=tiny", "seed=3"], ["'seed=3'", "--name=value"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv, parts, capsys):
    with pytest.raises(ArgumentError) as caught:
        parse_train(argv)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    for part in parts:
        assert part in message
    assert capsys.readouterr() == ("", "")


def test_values_that_make_no_run_are_refused():
    with pytest.raises(ConfigError, match="training.microbatches=3 must divide") as caught:
        parse_train(["--config=tiny", "--training.microbatches=3"])
    assert caught.value.exit_code == 2


def test_help_of_a_config_shows_every_field_with_its_value(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train(["--config=tiny", "--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for section in dataclasses.fields(Config):
        value = getattr(tiny, section.name)
        for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
            assert f"--{section.name}.{field.name} " in shown
    assert "Peak. (default: 0.005)" in " ".join(shown.replace("│", " ").split())


def test_help_without_a_config_lists_them(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "--config=NAME" in shown
    assert "DeepSeek-V3 as released: 671B parameters" in shown


class _DiskError(UserError):
    pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (_DiskError("checkpoint 3:\n no space"), 1, "error: checkpoint 3: no space\n"),
        (ArgumentError("--x is not an option"), 2, "error: --x is not an option\n"),
        (ConfigError("seed=-1"), 2, "error: seed=-1\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (None, 0, ""),
    ],
)
def test_how_a_program_ends(error, code, line, capsys):
    def program() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_main(program)
    assert caught.value.code == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("bug", [ValueError("ours"), FileNotFoundError(errno.ENOENT, "ours")])
def test_a_bug_keeps_its_traceback(bug):
    def program() -> None:
        raise bug

    with pytest.raises(type(bug)):
        run_main(program)


def test_a_reader_that_leaves_ends_the_program_quietly():
    program = "from dsv3_jax.command_line import *; run_main(lambda: [print('x' * 999) for _ in range(999)] and None)"
    run = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -c 10', sys.executable, program], capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("x" * 10, "")
