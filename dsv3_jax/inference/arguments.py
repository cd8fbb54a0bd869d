"""The command line of infer.py. tyro makes the options and the help; every mistake becomes one line."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, get_args

import tyro

from dsv3_jax.command_line import option_pairs, suggestion
from dsv3_jax.config import MeshConfig, Weights
from dsv3_jax.errors import ArgumentError
from dsv3_jax.inference.sampling import Sampling, SamplingError

ONE_DEVICE = MeshConfig(data=1)


@dataclass(frozen=True)
class InferArguments:
    """Continue text with a trained model."""

    checkpoint: Path
    """A workdir of train.py (its newest checkpoint), the folder of one checkpoint, or a Hugging Face directory."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Text to continue; '-' is read from standard input. Give it several times for a batch. Needed unless serving."""
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
    """Tokens that the MTP module guesses ahead and the model verifies in one pass: the same text greedily, the same
    distribution otherwise. Pays where a pass over a few tokens costs little more than one over one. 0: none."""
    serve: bool = False
    """Answer requests over HTTP, as OpenAI's server does, and with a page to chat at; what is sampled how is up to each
    request."""
    host: str = "127.0.0.1"
    """Serving: the address to listen at; 0.0.0.0 for whoever reaches this machine."""
    port: int = 8000
    """Serving: the port; 0 for any that is free."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Serving: what clients must send as their API key; by default none. Give it several times for several keys."""
    slots: int = 8
    """Serving: requests that run at the same time; others wait."""
    cache_tokens: int | None = None
    """Serving: tokens that the cache holds over all requests; by default 4096 a slot, or the model's whole context."""
    weights: Weights = "compute"
    """How the matrices are held: in the type they are multiplied in, or as the blocks of an FP8 Hugging Face directory,
    in half the memory of bfloat16; the results are the same."""
    mesh: MeshConfig = ONE_DEVICE
    """Devices to divide model and requests over; all 1, the default here: the first device."""


FLAGS = ("json", "chat", "serve")
SERVING = ("host", "port", "api_key", "slots", "cache_tokens")
MESH = tuple(f"mesh.{axis.name}" for axis in fields(MeshConfig))
OPTIONS = (
    *("checkpoint", "prompt", "max_new_tokens", "speculative", "stop", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "weights"),
    *(*FLAGS, *SERVING, *MESH),
)
# What a server has, too; the rest is for prompts of the command line.
ALSO_SERVING = ("checkpoint", "speculative", "serve", "weights", *SERVING, *MESH)
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
    given = {option[2:].partition("=")[0] for option in options}
    serving = "serve" in given
    for name, value in (("checkpoint", "DIR"), *([] if serving else [("prompt", "TEXT")])):
        if name not in given:
            raise ArgumentError(f"--{name}={value} is missing; --help lists all options")
    for name in sorted(given.difference(ALSO_SERVING) if serving else given.intersection(SERVING)):
        raise ArgumentError(f"--{name} {'means nothing with' if serving else 'needs'} --serve")
    arguments = _tyro(options, PLACEHOLDER)
    _check_serving(arguments)
    if arguments.max_new_tokens < 1:
        raise ArgumentError(f"--max_new_tokens={arguments.max_new_tokens} must be at least 1")
    if arguments.speculative < 0:
        raise ArgumentError(f"--speculative={arguments.speculative} must be at least 0; 0 turns it off")
    return arguments


def _check_serving(arguments: InferArguments) -> None:
    if not 0 <= arguments.port < 2**16:
        raise ArgumentError(f"--port={arguments.port} must be between 0 and {2**16 - 1}")
    if "" in arguments.api_key:
        raise ArgumentError("--api_key is empty: leave it out to need none")
    for name in ("slots", "cache_tokens"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise ArgumentError(f"--{name}={number} must be at least 1")


def _require_readable(option: str) -> None:
    # tyro reports a bad value in a box on stderr and exits; asked for one option at a time, we can say which it was.
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            _tyro([option], PLACEHOLDER)
    except SamplingError as error:
        raise ArgumentError(f"--{error}") from error
    except SystemExit:
        name = option[2:].partition("=")[0]
        whole = ("max_new_tokens", "speculative", "top_k", "seed", "port", "slots", "cache_tokens", *MESH)
        kind = "no value" if name in FLAGS else "a whole number" if name in whole else "a number"
        kind = " or ".join(get_args(Weights)) if name == "weights" else kind
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
