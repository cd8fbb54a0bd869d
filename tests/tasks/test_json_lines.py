"""Problems of others: from files, and from a library that a module of this test stands in for."""

import json
import sys
import textwrap
from pathlib import Path

import pytest

from dsv3_jax import tasks
from dsv3_jax.config import ConfigError
from dsv3_jax.config_checks import check_task
from dsv3_jax.data.errors import DataError
from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks import TaskError
from dsv3_jax.tasks.generated import split_of
from dsv3_jax.tasks.json_lines import JsonLinesTask
from dsv3_jax.tasks.verifier_process import VerifierFailure


def respond(answer: str) -> str:
    return f"<think></think><answer>{answer}</answer>"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"problem": f"Name {n}.", "answer": f"number {n}"}) + "\n" for n in range(80)))
    return path


def test_each_problem_is_in_one_split_and_each_epoch_another_order(file: Path):
    task = tasks.build(TaskConfig(kind="json_lines", path=str(file)))
    held_out, validation = ({problem.prompt for problem in split} for split in (task.held_out, task.validation))
    count = 80 - len(held_out) - len(validation)
    epochs = [[task.problem(epoch * count + place).prompt for place in range(count)] for epoch in range(2)]
    assert set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]
    assert {*epochs[0]} | held_out | validation == {f"Name {n}." for n in range(80)}
    assert all(split_of(prompt) == "held_out" for prompt in held_out)
    other = tasks.build(TaskConfig(kind="json_lines", path=str(file), seed=1))
    assert other.held_out == task.held_out and other.problem(0) != task.problem(0)


def test_an_answer_is_compared_word_for_word(file: Path):
    problem = tasks.build(TaskConfig(kind="json_lines", path=str(file))).held_out[0]
    assert problem.verify(respond(problem.answer.replace(" ", "\n"))).correct
    assert problem.verify(respond("number -1")).rewards == {"accuracy": 0.0, "format": 1.0}
    assert problem.verify(problem.answer).rewards == {"accuracy": 0.0, "format": 0.0}


def test_trap_L8_a_verifier_without_a_verdict_is_no_zero_reward(file: Path):
    def hang(expected: str, answer: str) -> bool:
        raise VerifierFailure("the verifier took more than 2 seconds")

    problem = JsonLinesTask(TaskConfig(kind="json_lines", path=str(file)), hang).problem(0)
    verdict = problem.verify(respond("x"))
    assert verdict.failed == "the verifier took more than 2 seconds" and not verdict.correct
    assert problem.verify("no form").failed is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "p", "solution": "5"}', "file.jsonl:3 has no field 'answer' (task.answer_field); its fields: p"),
        ('{"question": "p"}', "file.jsonl:3 has no field 'problem' (task.problem_field); its fields: question"),
        ('{"problem": "p", "answer": 5}', "file.jsonl:3 holds int, not text"),
        ("[1]", "file.jsonl:3 holds a JSON list, not an object"),
        ("{", "file.jsonl:3 is not JSON"),
    ],
)
def test_a_line_that_is_no_problem_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "file.jsonl"
    path.write_text(f'{{"problem": "p", "answer": "a"}}\n\n{line}\n')
    with pytest.raises(DataError) as caught:
        tasks.build(TaskConfig(kind="json_lines", path=str(path)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_too_few_problems_are_refused(tmp_path: Path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"problem": "p", "answer": "a"}\n')
    with pytest.raises(TaskError, match=r"few.jsonl has 1 problems, none of which falls to .*: a tenth each is set"):
        tasks.build(TaskConfig(kind="json_lines", path=str(path)))
    with pytest.raises(DataError, match="cannot read .*absent"):
        tasks.build(TaskConfig(kind="json_lines", path=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "json_lines"}, "task.path='' is empty"),
        ({"kind": "gym"}, "task.gym_dataset='' is empty"),
        ({"verifier_seconds": 0.0}, "task.verifier_seconds=0.0 must be above 0"),
        ({"verifier_processes": 0}, "task.verifier_processes=0 must be at least 1"),
    ],
)
def test_a_configuration_without_problems_is_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_task(TaskConfig(**changes))


GYM = """
    import time

    class Doubling:
        def __init__(self, seed, size, largest=9):
            self.size, self.largest = size, largest

        def __getitem__(self, index):
            assert 0 <= index < self.size
            number = index % self.largest
            return {"question": f"Twice {number} of {index}?", "answer": str(2 * number)}

        def score_answer(self, answer, entry):
            if answer == "hang":
                time.sleep(1000)
            return 1.0 if answer == entry["answer"] else 0.25 if answer.isdigit() else 0.0

    def create_dataset(name, **options):
        if name != "doubling":
            raise ValueError(f"Dataset '{name}' not registered")
        return Doubling(**options)
"""
MATH = """
    def parse(text):
        return eval(text.strip("$"))

    def verify(expected, answer):
        return expected == answer
"""


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch) -> None:
    """Stand-ins for the optional libraries, for this process and those that verify."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    (folder / "reasoning_gym.py").write_text(textwrap.dedent(GYM))
    (folder / "math_verify.py").write_text(textwrap.dedent(MATH))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    for name in ("reasoning_gym", "math_verify", "dsv3_jax.tasks.gym_scores"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(tasks, "gym_scores", raising=False)


def test_questions_and_scores_are_the_gyms(libraries):
    config = TaskConfig(kind="gym", gym_dataset="doubling", gym_options='{"largest": 5}', verifier_seconds=2.0)
    task = tasks.build(config)
    problem = next(found for found in map(task.problem, range(100)) if " 4 of" in found.prompt)
    scores = [problem.verify(respond(answer)).rewards["accuracy"] for answer in ("8", "9", "x")]
    assert scores == [1.0, 0.25, 0.0]
    assert problem.verify(respond("hang")).failed == "the verifier took more than 2 seconds"
    assert problem.verify("8").rewards["format"] == 0.0
    assert len({found.prompt for found in task.held_out}) == 200
    assert not {found.prompt for found in task.held_out} & {task.problem(index).prompt for index in range(500)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gym_dataset": "absent"}, "task.gym_dataset='absent' .* Dataset 'absent' not registered"),
        ({"gym_options": '{"smallest": 1}'}, "task.gym_options='{\"smallest\": 1}': .*unexpected keyword argument"),
        ({"gym_options": "5"}, "task.gym_options='5': it must be an object of JSON"),
        ({"gym_options": "{"}, "task.gym_options='{': Expecting property name"),
    ],
)
def test_what_the_gym_does_not_know_is_one_line(libraries, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        tasks.build(TaskConfig(**{"kind": "gym", "gym_dataset": "doubling", **changes}))
    assert "\n" not in str(caught.value)


def test_mathematics_is_compared_by_math_verify(libraries, tmp_path: Path):
    path = tmp_path / "mathematics.jsonl"
    lines = [{"q": f"Half of {n}?", "a": f"{n}/2"} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TaskConfig(kind="json_lines", path=str(path), problem_field="q", answer_field="a", verifier="math")
    problem = tasks.build(config).problem(0)
    number = int(problem.answer.removesuffix("/2"))
    assert problem.verify(respond(f"{2 * number}/4")).correct
    assert problem.verify(respond(str(number / 2 + 1))).rewards == {"accuracy": 0.0, "format": 1.0}
    assert problem.verify(respond("what?")).failed.startswith("the verifier raised SyntaxError")


@pytest.mark.parametrize("name", ["reasoning_gym", "math_verify"])
def test_a_library_that_is_not_installed_is_named(name: str, file: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    kind = {"kind": "gym", "gym_dataset": "x"} if name == "reasoning_gym" else {"verifier": "math", "path": str(file)}
    with pytest.raises(ConfigError, match=f"pip install {name.replace('_', '-')}"):
        tasks.build(TaskConfig(**{"kind": "json_lines", **kind}))
