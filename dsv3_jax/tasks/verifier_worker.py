"""The other side of verifier_process.py: `python verifier_worker.py FILE FUNCTION` calls a function as it is asked to.

A script by itself, that imports nothing of the project: what is killed and restarted has to be quick to start.
Each line it reads is a JSON list of arguments; each it writes is {"value": ...} or {"error": ...}. The first says that
the function is loaded.
"""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any


def main(path: str, name: str) -> None:
    output = sys.stdout
    # What a library prints is no answer.
    with contextlib.redirect_stdout(sys.stderr):
        function = loaded(path, name)
        answer(output, {"value": None})
        for line in sys.stdin:
            try:
                result = {"value": function(*json.loads(line))}
            except Exception as error:  # whatever a verifier raises of a response is told, and the next one served
                result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            answer(output, result)


def loaded(path: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("verifier", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def answer(output: Any, result: dict[str, Any]) -> None:
    output.write(json.dumps(result) + "\n")
    output.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
