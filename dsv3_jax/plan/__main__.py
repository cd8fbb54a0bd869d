"""Will it fit, and what bounds it: `python -m dsv3_jax.plan --config=v3_671b --topology=v5p:4x4x8 --mesh.expert=64`.

Compiles the real program for a TPU machine with libtpu, on any CPU, and reads what the compiler made of it. Exits with
1 where it does not fit.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import jax
import tyro
from tqdm import tqdm

from dsv3_jax.command_line import parse_with_config, run_main
from dsv3_jax.config import Config, Weights
from dsv3_jax.errors import ArgumentError
from dsv3_jax.plan.plan import Kind, make_plan, plan_work, summary
from dsv3_jax.plan.report import report
from dsv3_jax.plan.topology import set_up_libtpu, topology


@dataclass(frozen=True)
class PlanArguments:
    """One program on one machine."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    config_name: Annotated[str, tyro.conf.arg(name="config")]
    """Name of a file in configs/; every option of a run defaults to its value there."""
    topology: str
    """A chip and the sides of the machine, such as v5p:4x4x8."""
    slices: int = 1
    """Machines of that size, joined by the data-centre network."""
    program: Kind = "train"
    """The training step; prefill, whole prompts into a cache; decode, one token a row against a full cache."""
    rows: int | None = None
    """Prompts at a time, for prefill and decode. None: one for every device that takes rows."""
    positions: int | None = None
    """Tokens of a prompt, or positions of the cache. None: training.sequence_length."""
    weights: Weights = "compute"
    """For prefill and decode, how the matrices are held: in model.precision, or in FP8 with a scale a block."""
    json: bool = False
    """Print one JSON object instead of text."""


def main() -> None:
    arguments = parse_plan(sys.argv[1:])
    machine = topology(arguments.topology, arguments.slices)
    work = plan_work(
        arguments.config, machine, arguments.program, arguments.rows, arguments.positions, arguments.weights
    )
    plan = make_plan(work, compiled_in_sight)
    print(json.dumps(summary(plan)) if arguments.json else report(plan))
    if not plan.fits:
        raise SystemExit(1)


def parse_plan(argv: Sequence[str]) -> PlanArguments:
    """What `argv` asks for, checked. Raises ArgumentError and ConfigError, as train.py's command line does."""
    arguments = parse_with_config(
        argv, "python -m dsv3_jax.plan", lambda config, name: PlanArguments(config, name, ""), flags=("json",)
    )
    if not arguments.topology:
        raise ArgumentError("--topology=CHIP:SIDES is missing, such as --topology=v5p:4x4x8")
    if arguments.weights == "float8" and arguments.program == "train":
        raise ArgumentError("--weights=float8 is for --program=prefill and decode: training keeps float32")
    for name in ("rows", "positions"):
        value = getattr(arguments, name)
        if value is not None and arguments.program == "train":
            raise ArgumentError(f"--{name}={value} is for --program=prefill and decode; a step has training.batch_size")
        if value is not None and value < 1:
            raise ArgumentError(f"--{name}={value} must be at least 1")
    return arguments


def compiled_in_sight(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """What was compiled, and the seconds it took; the seconds are shown as they pass."""
    start = time.perf_counter()
    with _clock("compiling"):
        return lowered.compile(), time.perf_counter() - start


@contextmanager
def _clock(what: str) -> Iterator[None]:
    done = threading.Event()
    with tqdm(bar_format=f"{what} {{elapsed}}", leave=False, disable=not sys.stderr.isatty()) as bar:

        def tick() -> None:
            while not done.wait(1.0):
                bar.refresh()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


if __name__ == "__main__":
    set_up_libtpu()
    run_main(main)
