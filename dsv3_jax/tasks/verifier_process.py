"""Verifiers in processes of their own, with a deadline.

Libraries that verify answers hang on some, end their process on others, and time themselves with signals that only a
main thread gets. Here a call either returns in time or is a `VerifierFailure` with its reason; its process is then
killed, and the next call gets a fresh one.
"""

import atexit
import contextlib
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from dsv3_jax.tasks import verifier_worker

START_SECONDS = 120.0
"""For a process to import its library, on a machine that does other things."""


class VerifierFailure(Exception):
    """No result. The message is the reason, in a few words that are the same for failures of one kind."""


class VerifierPool:
    """`pool.call(...)` calls a function in one of several processes. It may be called from any thread.

    Processes start when they are first needed.
    """

    def __init__(self, file: Path, function: str, *, processes: int, seconds: float):
        """Args:
        file: a Python file with the function; it is loaded by itself, without its package.
        function: takes and returns what JSON has.
        seconds: that a call may take.
        """
        # The last one used first: one at a time needs one process.
        self._workers: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for _ in range(processes):
            self._workers.put(_Worker([str(file), function], seconds))

    def call(self, *arguments: Any) -> Any:
        """The function's result.

        Raises:
            VerifierFailure: it raised, took too long, or its process died.
        """
        worker = self._workers.get()
        try:
            return worker.call(arguments)
        finally:
            self._workers.put(worker)


class _Worker:
    """One process, used by one thread at a time."""

    def __init__(self, command: list[str], seconds: float):
        # -P: a library that imports a module called gym, say, does not mean the one in this folder.
        self._command, self._seconds = [sys.executable, "-P", verifier_worker.__file__, *command], seconds
        self._process: subprocess.Popen | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def call(self, arguments: tuple[Any, ...]) -> Any:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process and self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # a process that has died ends its output, too
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        return self._result(self._seconds)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        atexit.register(self._process.kill)
        # A queue of this process's own: what an earlier one still says is not heard.
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        self._result(START_SECONDS)

    def _result(self, seconds: float) -> Any:
        assert self._process
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self._end()
            raise VerifierFailure(f"the verifier took more than {seconds:g} seconds") from None
        if not line:
            raise VerifierFailure(f"the verifier's process ended with exit code {self._end()}")
        result = json.loads(line)
        if "error" in result:
            raise VerifierFailure(f"the verifier raised {result['error']}")
        return result["value"]

    def _end(self) -> int:
        assert self._process
        process, self._process = self._process, None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)  # one that is ending by itself has an exit code of its own
        process.kill()
        atexit.unregister(process.kill)
        return process.wait()


def _read(output: Any, lines: queue.SimpleQueue) -> None:
    """Passes lines on, and "" at their end."""
    with output:
        for line in output:
            lines.put(line)
    lines.put("")
