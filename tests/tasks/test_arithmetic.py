import re

import pytest

from dsv3_jax import tasks
from dsv3_jax.config import ConfigError
from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks.arithmetic import ArithmeticProblem

TASK = tasks.build(TaskConfig(kind="arithmetic", arithmetic_digits=4))


def test_demonstrations_are_right_to_the_last_digit():
    for problem in [TASK.problem(index) for index in range(300)]:
        text = problem.demonstration()
        assert problem.verify(text).correct
        # Whatever a line claims with an equals sign holds.
        for left, right in re.findall(r"(\d[\d+*-]*)=(\d+)", text):
            assert eval(left) == int(right)
        assert eval(f"{problem.left}{problem.operator}{problem.right}") == problem.result


def test_the_last_digits_of_the_lines_spell_the_result():
    for problem in (p for p in map(TASK.problem, range(300)) if p.operator == "+"):
        sums = re.findall(r"=(\d+)", problem.demonstration())
        assert int(sums[-1] + "".join(each[-1] for each in reversed(sums[:-1]))) == problem.result
    for problem in (p for p in map(TASK.problem, range(300)) if p.operator == "-"):
        digits = re.findall(r"=(\d)$|=(\d)<", problem.demonstration(), re.MULTILINE)
        assert int("".join(first or last for first, last in reversed(digits))) == abs(problem.result)


@pytest.mark.parametrize(
    ("answer", "accuracy"),
    [("-4", 1.0), (" -4\n", 1.0), ("-04", 1.0), ("4", 0.0), ("- 4", 0.0), ("3 - 7", 0.0), ("−4", 0.0), ("-4.0", 0.0),
     ("", 0.0), ("9" * 10_000, 0.0)],
)  # fmt: skip
def test_an_answer_is_one_whole_number(answer: str, accuracy: float):
    verdict = ArithmeticProblem(3, "-", 7).verify(f"<think></think><answer>{answer}</answer>")
    assert verdict.rewards == {"accuracy": accuracy, "format": 1.0}


def test_operators_and_digits_are_the_configs():
    task = tasks.build(TaskConfig(kind="arithmetic", arithmetic_operators="*", arithmetic_digits=3))
    problems = [task.problem(index) for index in range(200)]
    assert {problem.operator for problem in problems} == {"*"}
    assert {len(str(problem.left)) for problem in problems} == {1, 2, 3}
    task = tasks.build(TaskConfig(kind="arithmetic", arithmetic_digits=3, arithmetic_least_digits=2))
    assert {len(str(task.problem(index).right)) for index in range(200)} == {2, 3}


def test_a_difficulty_with_too_few_problems_is_refused():
    task = tasks.build(TaskConfig(kind="arithmetic", arithmetic_operators="+", arithmetic_digits=1))
    with pytest.raises(ConfigError, match="task.held_out_problems=200 is more than task.kind=arithmetic has"):
        task.held_out  # noqa: B018
