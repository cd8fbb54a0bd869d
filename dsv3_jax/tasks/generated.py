"""Tasks whose problems are drawn at random, without end, and split by a hash of what makes each the same problem."""

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Generic, Literal, Protocol, TypeVar

from dsv3_jax.config import ConfigError
from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks.problem import Problem

Split = Literal["train", "validation", "held_out"]
VALIDATION_SHARE, HELD_OUT_SHARE = 0.1, 0.1
MOST_DRAWS = 50_000
"""For the problems of one split: a space that has not shown enough of them by then is too small."""


class KeyedProblem(Problem, Protocol):
    @property
    def key(self) -> str:
        """The same of problems that differ in nothing but the order of their operands."""


P = TypeVar("P", bound=KeyedProblem)


def split_of(key: str) -> Split:
    """The split of the problems with this key, on every machine and at every seed."""
    fraction = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48
    if fraction < VALIDATION_SHARE:
        return "validation"
    return "held_out" if fraction < VALIDATION_SHARE + HELD_OUT_SHARE else "train"


class GeneratedTask(Generic[P]):
    """Problems by number, each from a random stream of its own; the two fixed splits do not depend on the seed."""

    def __init__(self, config: TaskConfig, draw: Callable[[random.Random], P]):
        """`draw` makes a problem of random numbers."""
        self._config, self._draw = config, draw

    def problem(self, index: int) -> P:
        stream = random.Random(f"{self._config.seed}/{index}")
        for _ in range(MOST_DRAWS):
            problem = self._draw(stream)
            if split_of(problem.key) == "train":
                return problem
        raise ConfigError(f"task.kind={self._config.kind} has too few problems to train on at this difficulty")

    @cached_property
    def validation(self) -> Sequence[P]:
        return self._fixed("validation", self._config.validation_problems)

    @cached_property
    def held_out(self) -> Sequence[P]:
        return self._fixed("held_out", self._config.held_out_problems)

    def _fixed(self, split: Split, count: int) -> Sequence[P]:
        stream, found = random.Random(split), dict[str, P]()
        for _ in range(MOST_DRAWS):
            if len(found) == count:
                return tuple(found.values())
            problem = self._draw(stream)
            if split_of(problem.key) == split:
                found.setdefault(problem.key, problem)
        raise ConfigError(
            f"task.{split}_problems={count} is more than task.kind={self._config.kind} has at this difficulty: "
            f"{len(found)} were found"
        )
