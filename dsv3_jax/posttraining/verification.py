"""Verifiers in processes of their own: one that hangs or dies costs its response, not the run.

A deadline by signal works in the main thread alone, and not against code that does not return to Python; a thread
cannot be ended at all. So each of a few processes looks at one response at a time, and one that is late is killed.
"""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue

from dsv3_jax.tasks.problem import Problem, Verdict, verdict_on

STARTING_SECONDS = 60.0
"""For a process to be there; none of it is the verifier's."""


class Verifiers:
    """Some processes that verify; started when first needed, and again after one was killed."""

    def __init__(self, processes: int, seconds: float):
        """`seconds`: what a verifier may take for one response."""
        self._threads = ThreadPoolExecutor(processes)
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._all = [_Process(seconds) for _ in range(processes)]
        for process in self._all:
            self._idle.put(process)

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        """A verdict on each response, in order."""

        def verify(problem: Problem, response: str) -> Verdict:
            process = self._idle.get()
            try:
                return process.verdict(problem, response)
            finally:
                self._idle.put(process)

        return list(self._threads.map(verify, problems, responses))

    def close(self) -> None:
        self._threads.shutdown()
        for process in self._all:
            process.end()


class _Process:
    def __init__(self, seconds: float):
        self._seconds = seconds
        self._process: subprocess.Popen | None = None

    def verdict(self, problem: Problem, response: str) -> Verdict:
        try:
            if self._process is None:
                self._start()
            self._connection.send((problem, response))
            if not self._connection.poll(self._seconds):
                return self._failed(f"the verifier was not done after {self._seconds:g} seconds")
            return self._connection.recv()
        except (EOFError, OSError):
            return self._failed("the verifier's process ended")

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        # Not multiprocessing's own: that runs the main program's file again, and with it jax.
        command = [sys.executable, "-m", "dsv3_jax.posttraining.verification", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        if not self._connection.poll(STARTING_SECONDS):
            raise EOFError
        self._connection.recv()

    def _failed(self, why: str) -> Verdict:
        self.end()
        return verdict_on(False, 0.0, why)


def serve(connection: Connection) -> None:
    """Verify what comes until nobody is there to ask."""
    connection.send("ready")
    while True:
        try:
            problem, response = connection.recv()
        except (EOFError, OSError):
            return
        try:
            verdict = problem.verify(response)
        except Exception as error:
            verdict = verdict_on(False, 0.0, f"the verifier raised {type(error).__name__}: {error}")
        connection.send(verdict)


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this by closing the connection
    serve(Connection(int(sys.argv[1])))
