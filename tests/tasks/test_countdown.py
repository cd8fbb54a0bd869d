"""Countdown: what is asked can be done, what is shown does it, and nothing else is accepted."""

import dataclasses
import random
from fractions import Fraction

import pytest

from dsv3_jax import tasks
from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks.countdown import Attempt, CountdownProblem
from dsv3_jax.tasks.expressions import ExpressionError, evaluated

PROBLEM = CountdownProblem((3, 8, 3), 9, Attempt((), "", 9), 99, 0, 0)


def respond(answer: str) -> str:
    return f"<think>so</think><answer>{answer}</answer>"


def test_what_is_drawn_is_solved_by_its_own_demonstration():
    task = tasks.build(TaskConfig(countdown_numbers=4, countdown_largest_number=25))
    for problem in [task.problem(index) for index in range(100)] + [*task.validation[:20], *task.held_out[:20]]:
        verdict = problem.verify(problem.demonstration())
        assert verdict.correct and verdict.rewards["format"] == 1.0 and verdict.failed is None
        # Python's own parser and arithmetic agree, on the expression and on every step that is shown.
        assert eval(problem.solution.expression) == problem.target
        for attempt in (problem.solution, *problem.failures()):
            for step in attempt.steps:
                calculation, _, result = step.partition("=")
                assert eval(calculation) == int(result) and 1 <= int(result) <= 40
            assert (attempt.result == problem.target) == (attempt is problem.solution)


@pytest.mark.parametrize(
    ("answer", "accuracy"),
    [
        ("3 * 8 / 3 + 1", 0.0),  # a number that was not given
        ("8 + 3 / 3", 1.0),
        ("(8 + (3) / 3)", 1.0),
        ("8 + 1", 0.0),  # right, and not of the numbers
        ("9", 0.0),
        ("8 + 3 - 3", 0.0),
        ("8 + 3 / 3 = 9", 0.0),
        ("3 + 3 + 8 * 0", 0.0),
        ("8 / (3 - 3)", 0.0),
        ("__import__('os').abort()", 0.0),
        ("8 + 3 ** 3", 0.0),
        ("", 0.0),
        ("(" * 100, 0.0),
        ("8 + 3 / ٣", 0.0),
        ("8+3/3" + " " * 300, 1.0),  # whitespace around an answer is not of it
    ],
)
def test_only_an_expression_of_all_the_numbers_is_right(answer: str, accuracy: float):
    verdict = PROBLEM.verify(respond(answer))
    assert verdict.rewards == {"accuracy": accuracy, "format": 1.0}


def test_fractions_on_the_way_are_exact():
    problem = CountdownProblem((8, 3, 8, 3), 24, Attempt((), "", 24), 99, 0, 0)
    assert problem.verify(respond("8 / (3 - 8 / 3)")).correct


def test_random_expressions_have_the_value_that_python_gives_them():
    stream = random.Random(0)

    def expression(depth: int) -> str:
        if depth == 0 or stream.random() < 0.2:
            return str(stream.randint(0, 12))
        left, right = expression(depth - 1), expression(depth - 1)
        text = f"{left}{stream.choice(' ')}{stream.choice('+-*/')} {right}"
        return f"({text})" if stream.random() < 0.5 else text

    def in_fractions(text: str) -> Fraction:
        spelled = "".join(f"Fraction({part})" if part.isdigit() else part for part in _split(text))
        return eval(spelled)

    compared = 0
    while compared < 300:
        text = expression(3)
        try:
            value = in_fractions(text)
        except ZeroDivisionError:
            with pytest.raises(ExpressionError, match="division by zero"):
                evaluated(text)
            continue
        assert evaluated(text) == (value, [int(part) for part in _split(text) if part.isdigit()])
        compared += 1


def _split(text: str) -> list[str]:
    import re

    return re.findall(r"\d+|.", text)


def test_the_longest_expression_that_is_read_is_read():
    assert evaluated("(" * 99 + "7" + ")" * 99) == (7, [7])
    with pytest.raises(ExpressionError, match="more than 200 characters"):
        evaluated("1" * 201)


def test_how_many_attempts_fail_is_the_configs():
    task = tasks.build(dataclasses.replace(TaskConfig(), countdown_failures=2))
    counts = {len(task.problem(index).failures()) for index in range(100)}
    assert counts == {0, 1, 2}
