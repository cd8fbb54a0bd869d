"""Verifiers in processes of their own: what hangs, dies or raises costs one verdict and is told."""

import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv3_jax.tasks.verifier_process import VerifierFailure, VerifierPool

VERIFIER = """
    import os, signal, sys

    print("loading")

    def verify(answer):
        print("thinking about", answer)
        if answer == "hang":
            while True:
                pass
        if answer == "die":
            os._exit(3)
        if answer == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if answer == "raise":
            raise ValueError("no\\nsuch answer")
        if answer == "exit":
            sys.exit(4)
        if answer == "time":  # as math-verify does, and what only a main thread may
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.alarm(1)
        return [answer, os.getpid()]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("verifiers") / "verifier.py"
    path.write_text(textwrap.dedent(VERIFIER))
    return path


@pytest.fixture(scope="module")
def pool(file: Path) -> VerifierPool:
    return VerifierPool(file, "verify", processes=1, seconds=2.0)


def test_one_process_answers_call_after_call(pool: VerifierPool):
    answers = [pool.call(text) for text in ("a", "é\n\ud83d", "")]
    assert [text for text, _ in answers] == ["a", "é\n\ud83d", ""]
    assert len({process for _, process in answers}) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("hang", "the verifier took more than 2 seconds"),
        ("die", "the verifier's process ended with exit code 3"),
        ("kill", "the verifier's process ended with exit code -9"),
        ("exit", "the verifier's process ended with exit code 4"),
        ("raise", "the verifier raised ValueError: no such answer"),
    ],
)
def test_trap_L8_what_fails_is_told_and_the_next_call_is_answered(pool: VerifierPool, answer: str, reason: str):
    with pytest.raises(VerifierFailure) as caught:
        pool.call(answer)
    assert str(caught.value) == reason
    assert pool.call("after")[0] == "after"


def test_trap_L8_a_verifier_with_signals_works_from_any_thread(pool: VerifierPool):
    found = []
    thread = threading.Thread(target=lambda: found.append(pool.call("time")[0]))
    thread.start()
    thread.join()
    assert found == ["time"]


def test_threads_share_the_processes(file: Path):
    pool = VerifierPool(file, "verify", processes=2, seconds=30.0)
    words = [str(number) for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(pool.call, words))
    assert [text for text, _ in answers] == words
    assert 1 <= len({process for _, process in answers}) <= 2


def test_a_file_that_cannot_be_loaded_fails_every_call(tmp_path: Path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    pool = VerifierPool(tmp_path / "broken.py", "verify", processes=1, seconds=1.0)
    for _ in range(2):
        with pytest.raises(VerifierFailure, match="the verifier's process ended with exit code 1"):
            pool.call("a")
