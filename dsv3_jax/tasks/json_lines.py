"""Problems and answers from a .jsonl file, checked by equality or, mathematics, by math-verify."""

import functools
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_jax.config import ConfigError
from dsv3_jax.data.documents import JsonLines
from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks.generated import Split, split_of
from dsv3_jax.tasks.problem import TaskError, Verdict, answer_in, verdict_on
from dsv3_jax.tasks.verifier_process import VerifierFailure, VerifierPool

Agrees = Callable[[str, str], bool]
"""Whether an answer is the expected one, given first. Raises VerifierFailure: there is no telling."""


@dataclass(frozen=True)
class AnsweredProblem:
    """A problem with its answer."""

    prompt: str
    answer: str
    agrees: Agrees = field(repr=False, compare=False)

    def verify(self, response: str) -> Verdict:
        answer = answer_in(response)
        if answer is None:
            return verdict_on(False, 0.0)
        try:
            return verdict_on(True, float(self.agrees(self.answer, answer)))
        except VerifierFailure as failure:
            return verdict_on(True, 0.0, str(failure))


class JsonLinesTask:
    """Problems of a file, split by a hash of their words; training goes through its part again and again, each time in
    another order."""

    def __init__(self, config: TaskConfig, agrees: Agrees):
        """Raises TaskError, DataError: as `json_lines`."""
        lines = JsonLines(Path(config.path))
        splits: dict[Split, list[AnsweredProblem]] = {"train": [], "validation": [], "held_out": []}
        for row in range(len(lines)):
            prompt = lines.text(row, config.problem_field, "task.problem_field")
            answer = lines.text(row, config.answer_field, "task.answer_field")
            splits[split_of(" ".join(prompt.split()))].append(AnsweredProblem(prompt, answer, agrees))
        if empty := [name for name, problems in splits.items() if not problems]:
            raise TaskError(
                f"task.path={config.path} has {len(lines)} problems, none of which falls to {', '.join(empty)}: a "
                "tenth each is set apart for validation and held_out, so give more of them"
            )
        self._seed, self._training = config.seed, splits["train"]
        self.validation: Sequence[AnsweredProblem] = splits["validation"][: config.validation_problems]
        self.held_out: Sequence[AnsweredProblem] = splits["held_out"][: config.held_out_problems]

    def problem(self, index: int) -> AnsweredProblem:
        epoch, place = divmod(index, len(self._training))
        return self._training[_order(self._seed, epoch, len(self._training))[place]]


def json_lines(config: TaskConfig) -> JsonLinesTask:
    """The problems of `task.path`.

    Raises:
        DataError: the file cannot be read, or a line lacks a field; with the file and the line.
        TaskError: too few problems.
        ConfigError: math-verify is asked for and not installed.
    """
    if config.verifier == "exact":
        return JsonLinesTask(config, _same_words)
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("task.verifier=math needs math-verify: pip install math-verify[antlr4_13_2]")
    pool = VerifierPool(
        Path(__file__).with_name("math_answers.py"),
        "agrees",
        processes=config.verifier_processes,
        seconds=config.verifier_seconds,
    )
    return JsonLinesTask(config, pool.call)


def _same_words(expected: str, answer: str) -> bool:
    return expected.split() == answer.split()


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)
