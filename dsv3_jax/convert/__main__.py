"""Checkpoints to and from Hugging Face: `python -m dsv3_jax.convert import HF_DIR OUT`, `export`, `inspect`.

import  HF_DIR OUT       a directory with config.json and *.safetensors into a checkpoint for train.py and infer.py
export  CHECKPOINT OUT   a workdir, checkpoint or Hugging Face directory into a Hugging Face directory
inspect DIR              what is in any of these, what is missing, and what converting it takes
"""

import contextlib
import dataclasses
import io
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsv3_jax.command_line import expected, option_pairs, run_main, suggestion
from dsv3_jax.convert.exporting import export_checkpoint
from dsv3_jax.convert.importing import import_checkpoint
from dsv3_jax.convert.inspecting import inspect
from dsv3_jax.convert.observing import Bar
from dsv3_jax.convert.outputs import DType, ScaleFormat
from dsv3_jax.convert.projection import projected
from dsv3_jax.errors import ArgumentError
from dsv3_jax.runtime import keep_freed_memory

WORKERS = os.cpu_count() or 1


@dataclass(frozen=True)
class Import:
    """A Hugging Face directory of the DeepSeek-V3 family into a checkpoint that train.py --init and infer.py take.

    Tensors keep their type: FP8 stays FP8. Killed, it goes on where it was when called again.
    """

    hf_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="HF_DIR")]
    """Folder with config.json, *.safetensors and, as a rule, tokenizer.json."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to make."""
    workers: int = WORKERS
    """Threads, each holding some 32 MiB at a time."""


@dataclass(frozen=True)
class Export:
    """A model into a Hugging Face directory that transformers and vLLM load.

    Killed, it goes on where it was when called again.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A workdir of train.py (its newest checkpoint), a checkpoint, or a Hugging Face directory."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to make."""
    dtype: DType | None = None
    """fp8: blocks of 128 x 128 with scales, the rest bf16. None: every tensor as it is stored, bit for bit."""
    scale_format: ScaleFormat | None = None
    """Of FP8 blocks; ue8m0: powers of two, as V3.1 has them. None: as stored, float32 for new ones."""
    no_mtp: bool = False
    """Leave the MTP layers out."""
    workers: int = WORKERS
    """Threads, each holding some 32 MiB several times over."""


@dataclass(frozen=True)
class Inspect:
    """What is in a folder: model family, sizes, types, what is missing or left over, disk and memory that it takes."""

    dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """A Hugging Face directory, a workdir or a checkpoint."""


COMMANDS: dict[str, Any] = {"import": Import, "export": Export, "inspect": Inspect}
FLAGS = ("no_mtp",)


class Console(Bar):
    def plan(self, read: int, write: int, out: Path, workers: int) -> None:
        print(projected(read, write, out, workers), file=sys.stderr)


def main() -> None:
    keep_freed_memory()
    match parse(sys.argv[1:]):
        case Import(source, out, workers):
            import_checkpoint(source, out, workers=workers, observer=Console())
            print(f"{out}: python infer.py --checkpoint={out} --prompt=TEXT, or train.py --config={out} --init={out}")
        case Export(source, out, dtype, scale_format, no_mtp, workers):
            export_checkpoint(
                source,
                out,
                dtype=dtype,
                scale_format=scale_format,
                mtp=not no_mtp,
                workers=workers,
                observer=Console(),
            )
            print(f"{out}: transformers.AutoModelForCausalLM.from_pretrained('{out}')")
        case Inspect(folder):
            report, whole = inspect(folder, WORKERS)
            print(report)
            if not whole:
                raise SystemExit(1)


def parse(argv: Sequence[str]) -> Any:
    """An Import, Export or Inspect. `--help` prints and exits with 0.

    Raises:
        ArgumentError: no such command or option, a folder missing, an unreadable value.
    """
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if command not in COMMANDS:
        wrong = f"{command!r} is no command{suggestion(command, COMMANDS)}" if command else "a command is missing"
        raise ArgumentError(f"{wrong}: python -m dsv3_jax.convert {', '.join(COMMANDS)}; --help tells of them")
    kind, words = COMMANDS[command], list(argv[1:])
    if "-h" in words or "--help" in words:
        _tyro(command, kind, ["--help"])
    hints = typing.get_type_hints(kind)
    options = [field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING]
    folders = [field.name for field in dataclasses.fields(kind) if field.name not in options]
    # Folders may stand before, after or between the options.
    given = [word for place, word in enumerate(words) if not word.startswith("--") and not _is_value(words, place)]
    rest = [word for place, word in enumerate(words) if word.startswith("--") or _is_value(words, place)]
    arguments = []
    for option, value in option_pairs(rest, FLAGS):
        if option not in options:
            raise ArgumentError(
                f"--{option} is not an option of {command}{suggestion(option, options, '--')}; --help lists them all"
            )
        if value is None and option not in FLAGS:
            raise ArgumentError(f"--{option} needs a value: {expected(hints[option])}")
        arguments.append(f"--{option}={value or 'True'}")
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                _tyro(command, kind, [arguments[-1], "--", *folders])
        except SystemExit:
            raise ArgumentError(f"--{option}={value} cannot be read: {expected(hints[option])}") from None
    _require_folders(command, [name.upper() for name in folders], given)
    parsed = _tyro(command, kind, [*arguments, "--", *given])
    if getattr(parsed, "workers", 1) < 1:
        raise ArgumentError(f"--workers={parsed.workers} must be at least 1")
    return parsed


def _require_folders(command: str, folders: list[str], given: list[str]) -> None:
    for word in given:
        if word.startswith("-") or not word:
            raise ArgumentError(f"{word!r} is no folder, and options are written --name=value")
    if len(given) != len(folders):
        wrong = f"{given[-1]!r} is too many" if len(given) > len(folders) else f"{folders[len(given)]} is missing"
        raise ArgumentError(f"{command} needs {' '.join(folders)}: {wrong}; --help lists the options")


def _is_value(words: Sequence[str], place: int) -> bool:
    """Whether a word is the value of the option before it."""
    if place == 0 or words[place].startswith("--"):
        return False
    before = words[place - 1]
    return before.startswith("--") and "=" not in before and before[2:].replace("-", "_") not in FLAGS


def _tyro(command: str, kind: Any, arguments: list[str]) -> Any:
    return tyro.cli(
        kind,
        prog=f"python -m dsv3_jax.convert {command}",
        args=arguments,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


if __name__ == "__main__":
    run_main(main)
