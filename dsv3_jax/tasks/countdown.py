"""Countdown: make the target of all the numbers. Solutions are searched for, and the search can be shown."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks.expressions import ExpressionError, evaluated
from dsv3_jax.tasks.generated import GeneratedTask
from dsv3_jax.tasks.problem import Verdict, answer_in, in_response_form, verdict_on


class Attempt(NamedTuple):
    """The numbers put together, two at a time, until one is left."""

    steps: tuple[str, ...]
    expression: str
    result: int


@dataclass(frozen=True)
class CountdownProblem:
    """Numbers, and a target that an expression with each of them exactly once has."""

    numbers: tuple[int, ...]
    target: int
    solution: Attempt
    largest: int
    """Of all numbers on the way to a result."""
    most_failures: int
    seed: int
    """Of the attempts that are shown to fail."""

    @property
    def key(self) -> str:
        return f"{sorted(self.numbers)} {self.target}"

    @property
    def prompt(self) -> str:
        numbers = ", ".join(map(str, self.numbers))
        return f"Make {self.target} from {numbers} with +-*/, each once."

    def verify(self, response: str) -> Verdict:
        answer = answer_in(response)
        if answer is None:
            return verdict_on(False, 0.0)
        try:
            value, used = evaluated(answer)
        except ExpressionError:
            return verdict_on(True, 0.0)
        return verdict_on(True, float(value == self.target and sorted(used) == sorted(self.numbers)))

    def failures(self) -> list[Attempt]:
        """Different attempts with other results, 0 to `most_failures` of them."""
        stream, found = random.Random(self.seed), dict[str, Attempt]()
        for _ in range(stream.randint(0, self.most_failures)):
            attempt = attempted(self.numbers, self.largest, stream)
            if attempt.result != self.target:
                found.setdefault(attempt.expression, attempt)
        return list(found.values())

    def demonstration(self) -> str:
        # The target beside each result: that the two are the same is then seen before it is said.
        lines = [f"{','.join(attempt.steps)} for {self.target} no" for attempt in self.failures()]
        lines.append(f"{','.join(self.solution.steps)} for {self.target} yes")
        return in_response_form("\n".join(lines), self.solution.expression)


def countdown(config: TaskConfig) -> GeneratedTask[CountdownProblem]:
    """`task.countdown_numbers` numbers from 1 to `task.countdown_largest_number`, targets up to
    `task.countdown_largest_target`, and demonstrations with up to `task.countdown_failures` attempts that fail."""
    largest, most_failures = config.countdown_largest_target, config.countdown_failures

    def draw(stream: random.Random) -> CountdownProblem:
        numbers = tuple(stream.randint(1, config.countdown_largest_number) for _ in range(config.countdown_numbers))
        solution = attempted(numbers, largest, stream)
        return CountdownProblem(numbers, solution.result, solution, largest, most_failures, stream.getrandbits(32))

    return GeneratedTask(config, draw)


def attempted(numbers: Sequence[int], largest: int, stream: random.Random) -> Attempt:
    """A random way to put the numbers together; everything on it is whole and between 1 and `largest`.

    A step that leaves this range is not taken, another is. There always is one: the difference of two numbers that
    differ, the quotient of two that do not.
    """
    left = [(number, str(number)) for number in numbers]
    steps = list[str]()
    while len(left) > 1:
        (first, of_first), (second, of_second) = stream.sample(left, 2)
        operator = stream.choice("+-*/")
        result = _combined(first, operator, second)
        if result is None or not 1 <= result <= largest:
            continue
        left.remove((first, of_first))
        left.remove((second, of_second))
        steps.append(f"{first}{operator}{second}={result}")
        left.append((result, f"({of_first}{operator}{of_second})"))
    return Attempt(tuple(steps), left[0][1].removeprefix("(").removesuffix(")"), left[0][0])


def _combined(first: int, operator: str, second: int) -> int | None:
    if operator == "/":
        return first // second if first % second == 0 else None
    return {"+": first + second, "-": first - second, "*": first * second}[operator]
