"""The whole way, in miniature: fine-tune on demonstrations, evaluate, save what is right, distill."""

import dataclasses
import json
import math
import sys
from itertools import combinations
from pathlib import Path

import jax
import pytest

import train
from dsv3_jax.command_line import parse_train, run_main
from dsv3_jax.data.chats import chat_of
from dsv3_jax.layout import mesh_of
from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks import __main__ as program
from dsv3_jax.tasks.__main__ import TaskArguments
from dsv3_jax.tasks.arithmetic import ArithmeticProblem
from dsv3_jax.tasks.evaluation import Judged, TaskEvaluation, figures, judged, pass_at
from dsv3_jax.tasks.problem import Verdict, verdict_on
from dsv3_jax.tasks.responses import Response
from dsv3_jax.training.metrics import read_metrics

VERY_SMALL = """
    --model.vocabulary=300 --model.width=32 --model.layers=2 --model.dense_ffn_width=32 --model.heads=2
    --model.query_latent=16 --model.key_value_latent=16 --model.nope_head_dim=8 --model.value_head_dim=8
    --model.experts=4 --model.expert_ffn_width=16 --model.expert_groups=2 --model.groups_per_token=2
    --model.experts_per_token=2 --training.batch_size=2 --training.sequence_length=200 --training.tokens=3200
    --training.log_interval=1 --training.sample_tokens=0 --optimizer.warmup_steps=1 --task.validation_problems=4
""".split()


@pytest.fixture(scope="module", autouse=True)
def one_device_here():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "mesh_of", lambda config, skeleton: mesh_of(config, skeleton, jax.devices()[:1]))
        yield


def run_train(workdir: Path, *options: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: train.train(parse_train([*VERY_SMALL, f"--workdir={workdir}", *options]), lambda: False))
    return caught.value.code


def run_tasks(capsys, monkeypatch, *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tasks", *options])
    with pytest.raises(SystemExit) as caught:
        run_main(program.main)
    return caught.value.code, *capsys.readouterr()


@pytest.fixture(scope="module")
def tuned(one_device_here, tmp_path_factory) -> Path:
    """A run on demonstrations."""
    workdir = tmp_path_factory.mktemp("runs") / "tuned"
    assert run_train(workdir, "--config=tiny_sft") == 0
    return workdir


def test_a_model_is_tuned_evaluated_and_distilled(tuned: Path, tmp_path: Path, capsys, monkeypatch):
    losses = [row["loss"] for row in read_metrics(tuned / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 8 and losses[-1] < losses[0]
    summary = json.loads((tuned / "summary.json").read_text())
    assert summary["validation_bits_per_byte"] > 0

    options = [f"--checkpoint={tuned}", "--problems=3", "--samples=2", "--max_new_tokens=8", "--slots=4"]
    saved = tmp_path / "right.jsonl"
    code, out, errors = run_tasks(capsys, monkeypatch, *options, "--split=train", "--json", f"--save={saved}")
    assert code == 0, errors
    found = json.loads(out)
    assert found["problems"] == 3 and found["sampled"]["responses"] == 6 and found["greedy"]["responses"] == 3
    assert found["greedy"]["tokens"] <= 8 and found["sampled"]["failed"] == {} and saved.read_text() == ""

    assert run_train(tmp_path / "student", "--config=tiny_student", f"--loss.teacher={tuned}") == 0
    divergences = [row["teacher_loss"] for row in read_metrics(tmp_path / "student" / "metrics.jsonl")]
    assert len(divergences) == 8 and divergences[-1] < divergences[0]
    kept = [json.loads((folder / "tokenizer.json").read_text()) for folder in (tuned, tmp_path / "student")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--config=tiny_student", "--loss.teacher=absent"], "absent holds no checkpoint"),
        (["--config=tiny_sft", "--task.kind=json_lines"], "task.path='' is empty"),
        (["--config=tiny_sft", "--data.path=absent.jsonl"], "data.path='absent.jsonl' does not exist"),
    ],
)
def test_what_cannot_be_tuned_is_one_line_and_leaves_nothing(options: list[str], part: str, tmp_path: Path, capsys):
    code, errors = run_train(tmp_path / "run", *options), capsys.readouterr().err
    assert code in (1, 2) and part in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "--checkpoint=DIR is missing"),
        (["--checkpoint=absent"], "absent holds no checkpoint"),
        (["--checkpoint={tuned}", "--samples=0"], "--samples=0 must be at least 1"),
        (["--checkpoint={tuned}", "--sample=0"], "did you mean --samples?"),
        (["--checkpoint={tuned}", "--problems=5", "--split=validation"], "--problems=5 is more than there are, 4"),
        (["--checkpoint={tuned}", "--temperature=-1"], "temperature=-1.0 must be finite"),
        (["--checkpoint={tuned}", "--task.countdown_numbers=1"], "task.countdown_numbers=1 must be between 2 and 10"),
        (["--checkpoint={tuned}", "--save=/"], "--save=/ is a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(tuned: Path, options: list[str], part: str, capsys, monkeypatch):
    options = [option.format(tuned=tuned) for option in options]
    code, _, errors = run_tasks(capsys, monkeypatch, *options)
    assert code in (1, 2) and part in errors.splitlines()[-1] and "Traceback" not in errors


def test_pass_at_k_is_the_share_of_draws_with_a_correct_one():
    for samples, correct, k in ((8, 3, 1), (8, 3, 4), (8, 3, 8), (5, 0, 2), (5, 5, 1), (6, 1, 5)):
        draws = list(combinations([1] * correct + [0] * (samples - correct), k))
        assert pass_at(k, samples, correct) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def one_judged(accuracy: float, tokens: int, ended: bool = True, failed: str | None = None) -> Judged:
    response = Response([1], [1] * tokens, "", ended)
    return Judged(response, verdict_on(accuracy > 0 or failed is not None, accuracy, failed))


def test_trap_L8_a_verifier_that_raises_costs_its_response_alone():
    class Raises:
        prompt = "What is 1/0?"

        def verify(self, response: str) -> Verdict:
            raise ZeroDivisionError("1/0")

    right = ArithmeticProblem(1, "+", 2)
    responses = [[Response([1], [2], "<think></think><answer>3</answer>", True)]] * 2
    (of_raising,), (of_other,) = judged([Raises(), right], responses)
    assert of_raising.verdict.failed == "the verifier raised ZeroDivisionError" and not of_raising.verdict.correct
    assert of_other.verdict.correct and of_other.verdict.failed is None


def test_trap_L8_figures_leave_out_what_no_verdict_was_come_to_and_count_it():
    found = figures(
        [
            [one_judged(1.0, 2), one_judged(0.0, 4, ended=False), one_judged(0.5, 3)],
            [one_judged(0.0, 3, failed="slow"), one_judged(0.0, 3, failed="slow"), one_judged(1.0, 3)],
        ]
    )
    assert found.failed == {"slow": 2} and found.responses == 6
    assert found.rewards == {"accuracy": 2.5 / 4, "format": 3 / 4}
    assert found.tokens == 3 and found.ended == pytest.approx(5 / 6)
    assert found.pass_at == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3), 3: 1.0}


def test_the_report_says_what_was_found(tuned: Path):
    sampled = figures(
        [[one_judged(1.0, 2), one_judged(0.0, 4, ended=False)], [one_judged(0.0, 3, failed="slow"), one_judged(0.0, 3)]]
    )
    lines = program.report(
        TaskArguments(tuned, TaskConfig()), TaskEvaluation(2, figures([[one_judged(1.0, 2)]]), sampled)
    )
    assert list(lines) == [
        "2 problems of countdown (held_out)",
        "greedy               pass@1 1.000, accuracy 1.000, format 1.000, 2.0 tokens, 100.0% ended",
        "8 samples at T=1     pass@1 0.250, pass@2 0.500, accuracy 0.333, format 0.333, 3.0 tokens, 75.0% ended, "
        "no verdict on 1 of 4: slow",
    ]


def test_correct_responses_become_chats_that_are_read_again(tmp_path: Path):
    problem = ArithmeticProblem(3, "+", 4)
    texts = [problem.demonstration(), problem.demonstration(), "<think></think><answer>8</answer>"]
    sampled = [
        Judged(Response([], [1], text, ended), problem.verify(text))
        for text, ended in zip([*texts, problem.demonstration() + " "], [True, True, True, False], strict=True)
    ]
    assert program.save_chats(tmp_path / "chats.jsonl", [problem], [sampled]) == 1
    (line,) = (tmp_path / "chats.jsonl").read_text().splitlines()
    expected = chat_of(problem.prompt, problem.demonstration(), "")
    assert tuple(json.loads(line)["messages"]) == expected.messages and math.isfinite(len(line))
    assert dataclasses.replace(expected, name="x").predicted == problem.demonstration()


def test_an_answer_without_thinking_can_be_left_out(tmp_path: Path):
    problem = ArithmeticProblem(3, "+", 4)
    texts = [problem.demonstration(), "<think> </think><answer>7</answer>"]
    sampled = [Judged(Response([], [1], text, True), problem.verify(text)) for text in texts]
    saved = [program.save_chats(tmp_path / f"{least}", [problem], [sampled], least) for least in (0, 1)]
    assert saved == [2, 1] and "+" in (tmp_path / "1").read_text()
