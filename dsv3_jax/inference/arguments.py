"""The command line of infer.py. tyro makes the options and the help; every mistake becomes one line."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dsv3_jax.command_line import option_pairs, suggestion
from dsv3_jax.errors import ArgumentError
from dsv3_jax.inference.sampling import Sampling, SamplingError


@dataclass(frozen=True)
class InferArguments:
    """Continue text with a trained model."""

    checkpoint: Path
    """A workdir of train.py (its newest checkpoint), the folder of one checkpoint, or a Hugging Face directory."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Text to continue; '-' is read from standard input. Give it several times for a batch."""
    max_new_tokens: int = 256
    """Tokens to generate at most; a completion ends earlier where the model ends the document."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    json: bool = False
    """Print one JSON object a prompt, a line each, instead of text."""
    chat: bool = False
    """Take each prompt as what a user says in a chat, by the model's own chat template, and print the answer alone."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; give it several times for several."""
    speculative: int = 0
    """Tokens that the MTP module guesses ahead and the model verifies in one pass: faster, and the same text greedily,
    the same distribution otherwise. 0: none."""


FLAGS = ("json", "chat")
OPTIONS = (
    *("checkpoint", "prompt", "max_new_tokens", "speculative", "stop", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed", *FLAGS),
)
PLACEHOLDER = InferArguments(Path(), ())


def parse_infer(argv: Sequence[str]) -> InferArguments:
    """What `argv` (without the program's name) asks for, checked.

    `--field=value` and `--field value`, underscores and hyphens mean the same. `--help` prints and exits with 0.

    Raises:
        ArgumentError: unknown option, missing or unreadable value, or one out of range.
    """
    if "-h" in argv or "--help" in argv:
        _tyro(["--help"], InferArguments(tyro.MISSING, tyro.MISSING))
    options = []
    for name, value in option_pairs(argv, flags=FLAGS):
        if name not in OPTIONS:
            raise ArgumentError(f"--{name} is not an option{suggestion(name, OPTIONS, '--')}; --help lists them all")
        if value is None and name not in FLAGS:
            raise ArgumentError(f"--{name} needs a value: --{name}=VALUE")
        options.append(f"--{name}" if value is None else f"--{name}={value}")
        _require_readable(options[-1])
    for name, value in (("checkpoint", "DIR"), ("prompt", "TEXT")):
        if not any(option.startswith(f"--{name}=") for option in options):
            raise ArgumentError(f"--{name}={value} is missing; --help lists all options")
    arguments = _tyro(options, PLACEHOLDER)
    if arguments.max_new_tokens < 1:
        raise ArgumentError(f"--max_new_tokens={arguments.max_new_tokens} must be at least 1")
    if arguments.speculative < 0:
        raise ArgumentError(f"--speculative={arguments.speculative} must be at least 0; 0 turns it off")
    return arguments


def _require_readable(option: str) -> None:
    # tyro reports a bad value in a box on stderr and exits; asked for one option at a time, we can say which it was.
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            _tyro([option], PLACEHOLDER)
    except SamplingError as error:
        raise ArgumentError(f"--{error}") from error
    except SystemExit:
        name = option[2:].partition("=")[0]
        whole = ("max_new_tokens", "speculative", "top_k", "seed")
        kind = "no value" if name in FLAGS else "a whole number" if name in whole else "a number"
        raise ArgumentError(f"{option} cannot be read: expected {kind}") from None


def _tyro(argv: list[str], defaults: InferArguments) -> InferArguments:
    return tyro.cli(
        InferArguments,
        prog="python infer.py",
        args=argv,
        default=defaults,
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
