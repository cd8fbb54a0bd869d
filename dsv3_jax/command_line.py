"""The command line of train.py, and how errors end a program.

    python train.py --config=NAME [--workdir=DIR] [--init=DIR] [--describe] [--section.field=value ...]

tyro makes the options, their types and the help text from the dataclasses; this file pairs options with values first,
so that every mistake becomes one line.
"""

import contextlib
import dataclasses
import difflib
import errno
import importlib
import io
import os
import pkgutil
import re
import sys
import traceback
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

import configs
from dsv3_jax.config import Config
from dsv3_jax.config_checks import check
from dsv3_jax.errors import ArgumentError, UserError
from dsv3_jax.processes import ProcessArguments, end_process, leave_processes, several_processes
from sharding.mesh import LayoutError

A = TypeVar("A", bound=Any)
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class TrainArguments:
    """One training run. Running the same command again resumes it from its last checkpoint."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    config_name: Annotated[str, tyro.conf.arg(name="config")]
    """Name of a file in configs/, or a folder with a model to take it from; every option below defaults to its value
    there."""
    workdir: Path
    """Folder of the run: config.json, metrics, checkpoints, plots, summary.json."""
    init: Path | None
    """Start from the parameters of this workdir, checkpoint or Hugging Face directory."""
    process: ProcessArguments
    describe: bool
    """Print where every parameter lives on the mesh, and train nothing."""


def parse_train(argv: Sequence[str]) -> TrainArguments:
    """The run that `argv` (without the program's name) asks for, checked.

    `--field=value` and `--field value`, underscores and hyphens mean the same; the last of several wins. `--help`
    prints and exits with 0.

    Raises:
        ArgumentError: unknown config or option, missing or unreadable value.
        ConfigError: the values do not make a run.
    """
    arguments = parse_with_config(
        argv,
        "python train.py",
        lambda config, name: TrainArguments(
            config, name, Path("runs") / Path(name).name, None, ProcessArguments(), False
        ),
        flags=("describe",),
    )
    for option, folder in (("workdir", arguments.workdir), ("init", arguments.init)):
        if bucket := re.match(r"(\w+:)/(.*)", str(folder)):  # a Path has made one slash of two
            given = "//".join(bucket.groups())
            raise ArgumentError(f"--{option}={given} is no folder: mount the bucket and give where it is mounted")
    if arguments.workdir.exists() and not arguments.workdir.is_dir():
        raise ArgumentError(f"--workdir={arguments.workdir} is a file: give a folder")
    return arguments


def parse_with_config(
    argv: Sequence[str], program: str, defaults_of: Callable[[Config, str], A], flags: Collection[str] = ()
) -> A:
    """Arguments that begin with a config's, each defaulting to its value there; the config is checked.

    Args:
        defaults_of: the arguments of a config and its name, of a dataclass whose fields `config` and `config_name` are
            annotated as those of TrainArguments.
        flags: boolean options that need no value.

    Raises:
        ArgumentError, ConfigError: as `parse_train`.
    """
    if wants_help := any(argument in ("-h", "--help") for argument in argv):
        argv = [argument for argument in argv if argument not in ("-h", "--help")]
    given = dict(option_pairs(argv, flags))
    for flag in flags:
        if flag in given:
            given[flag] = given[flag] or "True"
    if "config" not in given and wants_help:
        print(_general_help(program))
        raise SystemExit(0)
    name = given.get("config")
    arguments = parse_options(given, program, defaults_of(load_config(name), name or ""), wants_help)
    check(arguments.config)
    return arguments


def parse_options(given: Mapping[str, str | None], program: str, defaults: A, wants_help: bool = False) -> A:
    """`defaults`, with the values of the options that are given.

    Raises:
        ArgumentError: unknown option, missing or unreadable value.
    """
    types = _field_types(type(defaults))
    for option in given:
        if option not in types:
            raise ArgumentError(f"--{option} is not an option{suggestion(option, types, '--')}; --help lists them all")
    if wants_help:
        _tyro(["--help"], program, defaults)
    for option, value in given.items():
        if value is None:
            raise ArgumentError(f"--{option} needs a value: {expected(types[option])}")
    written = [f"--{option}={value}" for option, value in given.items()]
    # tyro reports a bad value in a box on stderr and exits; one option at a time, its exit names the field.
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return _tyro(written, program, defaults)
    except SystemExit:
        for option, value in given.items():
            _require_readable(option, value, types[option], program, defaults)
        return _tyro(written, program, defaults)


def config_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def load_config(name: str | None) -> Config:
    """The value `config` of configs/NAME.py, or that of the model in a folder.

    Raises:
        ArgumentError: neither; with the list of names.
        UserError: a folder without a whole model.
    """
    names = config_names()
    if not name:
        raise ArgumentError(f"--config=NAME is missing; NAME is one of {', '.join(names)}")
    if name not in names and Path(name).is_dir():
        from dsv3_jax.convert.opening import open_model  # Orbax and TensorStore, that most commands do without

        return open_model(Path(name)).config
    if name not in names:
        raise ArgumentError(f"--config={name} does not exist{suggestion(name, names)}; there are {', '.join(names)}")
    return importlib.import_module(f"configs.{name}").config


def run_main(function: Callable[[], None]) -> NoReturn:
    """Run a program and exit. A user's mistake or a full disk is one line on stderr; a bug keeps its traceback.

    Exit codes: 0, the error's own (2 arguments and configuration, 1 failed while running), 130 interrupted.
    """
    try:
        function()
    except (UserError, LayoutError) as error:
        _exit(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output left, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            _end_where_others_wait()
            raise
        _exit(str(error), 1)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except Exception:
        _end_where_others_wait()
        raise
    leave_processes()
    sys.exit(0)


def _end_where_others_wait() -> None:
    if several_processes():
        traceback.print_exc()
        end_process(1)


def _exit(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    end_process(code)


def option_pairs(argv: Sequence[str], flags: Collection[str] = ()) -> list[tuple[str, str | None]]:
    """Option names, hyphens made underscores, with their values; None where no value follows, or for a flag alone.

    Raises:
        ArgumentError: a word that belongs to no option.
    """
    pairs: list[tuple[str, str | None]] = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ArgumentError(f"{argument!r} is not an option: options are written --name=value")
        option, equals, text = argument[2:].partition("=")
        name, value = option.replace("-", "_"), text if equals else None
        if not equals and name not in flags and remaining and not remaining[0].startswith("--"):
            value = remaining.pop(0)
        pairs.append((name, value))
    return pairs


def _field_types(of: type) -> dict[str, Any]:
    """Dotted option name -> type, for every leaf."""
    return dict(_leaves(of, ""))


def _leaves(of: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(of, include_extras=True)
    for field in dataclasses.fields(of):
        hint, name = hints[field.name], field.name
        if typing.get_origin(hint) is Annotated:
            hint, argument = typing.get_args(hint)
            name = argument.name
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{name}." if name else prefix)
        else:
            yield prefix + name, hint


def _require_readable(option: str, value: str | None, kind: Any, program: str, defaults: Any) -> None:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            _tyro([f"--{option}={value}"], program, defaults)
    except SystemExit:
        raise ArgumentError(f"--{option}={value} cannot be read: {expected(kind)}") from None


def _tyro(argv: list[str], program: str, defaults: A) -> A:
    return tyro.cli(
        type(defaults),
        prog=program,
        args=argv,
        default=defaults,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


def expected(kind: Any) -> str:
    """A type in words: 'expected int or None', 'expected True or False', 'expected one of sigmoid, softmax'."""
    if kind is bool:
        return "expected True or False"
    literal = typing.get_origin(kind) is typing.Literal
    alternatives = (kind,) if literal else typing.get_args(kind) or (kind,)
    return "expected " + " or ".join(map(_in_words, alternatives))


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return "None" if kind is type(None) else kind.__name__


def suggestion(word: str, known: typing.Iterable[str], mark: str = "") -> str:
    """', did you mean X?', or nothing where no known word is close; a field without its section finds it too."""
    known = list(known)
    same_field = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    close = same_field or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {mark}{close[0]}?)" if close else ""


def _general_help(program: str) -> str:
    lines = [f"usage: {program} --config=NAME [--OPTION=VALUE ...]", "", "configs:"]
    width = max(map(len, config_names()))
    for name in config_names():
        summary = (importlib.import_module(f"configs.{name}").__doc__ or "").strip().partition("\n")[0]
        lines.append(f"  {name:<{width}}  {summary}")
    return "\n".join([*lines, "", f"{program} --config=NAME --help shows every option, its meaning and its value."])
