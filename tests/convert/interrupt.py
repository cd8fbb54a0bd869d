"""Conversions in processes of their own that end early: python -m tests.convert.interrupt '[[CALL, AT], ...]'.

CALL is [function, source, out, options]. AT is when the process kills itself: [name, n], at the n-th use of one of
`PLACES`; or ["limit", n]: it goes on where no file may have more than n bytes. One fork of this process for each.
Prints exit codes, a signal's negative, and what went to stderr, as JSON.
"""

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.command_line import run_main
from dsv3_jax.convert import exporting, importing
from dsv3_jax.convert.__main__ import Console
from dsv3_jax.convert.resumable import PartialFolder

FUNCTIONS: dict[str, Callable[..., object]] = {
    "import": importing.import_checkpoint,
    "export": exporting.export_checkpoint,
}
PLACES: dict[str, tuple[Any, str]] = {
    "finish": (PartialFolder, "finish"),
    "complete": (PartialFolder, "complete"),
    "convert": (importing._Import, "_convert"),
    "write": (exporting, "_write_block"),
    "rmtree": (shutil, "rmtree"),
    "rename": (os, "rename"),
    "replace": (Path, "replace"),
}


def kill_at(place: str, number: int) -> None:
    """End this process where it is about to use something for the `number`-th time, counted from 0."""
    holder, name = PLACES[place]
    original, used = getattr(holder, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        used.append(name)
        if len(used) > number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(holder, name, counted)


def run(call: list[Any], at: list[Any], errors: int) -> None:
    function, source, out, options = call
    os.dup2(errors, 2)
    if at[0] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (at[1], at[1]))
    else:
        kill_at(*at)
    run_main(lambda: FUNCTIONS[function](Path(source), Path(out), workers=2, observer=Console(), **options))


def main() -> None:
    results = []
    for call, at in json.loads(sys.argv[1]):
        with tempfile.TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                run(call, at, errors.fileno())
            _, status = os.waitpid(child, 0)
            errors.seek(0)
            results.append([os.waitstatus_to_exitcode(status), errors.read().decode()])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
