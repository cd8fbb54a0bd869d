"""The form of a response, and what every task of our own keeps to."""

import dataclasses
import subprocess
import sys

import pytest

from dsv3_jax import tasks
from dsv3_jax.config import ConfigError
from dsv3_jax.config_checks import check_task
from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks.arithmetic import ArithmeticProblem
from dsv3_jax.tasks.problem import DemonstratedProblem, answer_in

OWN = [
    TaskConfig(),
    TaskConfig(kind="arithmetic"),
    TaskConfig(countdown_numbers=2, validation_problems=10, held_out_problems=10),
]


@pytest.mark.parametrize(
    "response",
    [
        "<think>a</think><answer>10</answer>",
        "\n<think>\na\n</think>\n\n<answer> 10 </answer>\n",
        "<think></think><answer>10</answer>",
    ],
)
def test_the_form(response: str):
    assert answer_in(response) == "10"


@pytest.mark.parametrize(
    "response",
    [
        "",
        "10",
        "<answer>10</answer>",
        "<think>a</think>10",
        "<think>a</think><answer>10",
        "<think>a<answer>10</answer></think>",
        "<think>a</think> so <answer>10</answer>",
        "<think>a</think><answer>10</answer> or 11",
        "<think>a</think><think>b</think><answer>10</answer>",
        "<think>a</think><answer>9</answer><answer>10</answer>",
        "<think><think>a</think><answer>10</answer>",
        "<Think>a</Think><answer>10</answer>",
    ],
)
def test_trap_L7_no_accuracy_without_the_format(response: str):
    assert answer_in(response) is None
    assert ArithmeticProblem(4, "+", 6).verify(response).rewards == {"accuracy": 0.0, "format": 0.0}


def test_many_tags_are_read_in_no_time():
    assert answer_in("<think>" + "</think>" * 200_000 + "<answer>" * 200_000) is None


@pytest.mark.parametrize("config", OWN, ids=str)
def test_splits_have_no_problem_in_common_whatever_the_order_of_operands(config: TaskConfig):
    task = tasks.build(config)
    training = {problem.key for problem in map(task.problem, range(2000))}
    validation, held_out = ([problem.key for problem in split] for split in (task.validation, task.held_out))
    assert len(set(validation)) == len(validation) == config.validation_problems
    assert len(set(held_out)) == len(held_out) == config.held_out_problems
    assert not training & {*validation, *held_out} and not {*validation} & {*held_out}


def test_the_order_of_operands_changes_no_key():
    one, other = ArithmeticProblem(4, "+", 6), ArithmeticProblem(6, "+", 4)
    assert one.key == other.key != ArithmeticProblem(4, "*", 6).key
    problem = tasks.build(TaskConfig()).problem(3)
    assert dataclasses.replace(problem, numbers=problem.numbers[::-1]).key == problem.key


@pytest.mark.parametrize("config", OWN, ids=str)
def test_problems_are_the_same_in_every_process_and_others_at_another_seed(config: TaskConfig):
    task, other = tasks.build(config), tasks.build(dataclasses.replace(config, seed=1))
    program = (
        "from dsv3_jax import tasks; from dsv3_jax.task_config import TaskConfig; "
        f"task = tasks.build({config!r}); "
        "print([p.demonstration() for p in (*map(task.problem, range(20)), *task.held_out)])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    problems = [*map(task.problem, range(20)), *task.held_out]
    assert printed.strip() == str([problem.demonstration() for problem in problems])
    assert [p.prompt for p in map(other.problem, range(20))] != [p.prompt for p in problems[:20]]
    assert other.held_out == task.held_out and other.validation == task.validation
    assert all(isinstance(problem, DemonstratedProblem) for problem in problems)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out_problems": 0}, "task.held_out_problems=0 must be at least 1"),
        ({"countdown_numbers": 1}, "task.countdown_numbers=1 must be between 2 and 10"),
        ({"countdown_failures": -1}, "task.countdown_failures=-1 must be at least 0"),
        ({"countdown_largest_number": 100}, "task.countdown_largest_number=100 must be at most task.countdown_large"),
        ({"arithmetic_digits": 41}, "task.arithmetic_digits=41 must be at most"),
        ({"arithmetic_operators": ""}, r"task.arithmetic_operators='' must be some of \+ - \*"),
        ({"arithmetic_operators": "+/"}, r"task.arithmetic_operators='\+/' must be some"),
        ({"seed": -1}, "task.seed=-1 must be between 0 and"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_task(dataclasses.replace(TaskConfig(), **changes))
