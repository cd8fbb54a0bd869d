"""The order of R1's stages and what each is given, read off the commands; they are played, not run (tests/slow runs
them)."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dsv3_jax.command_line import load_config, option_pairs, run_main
from dsv3_jax.config_checks import check
from dsv3_jax.r1 import __main__ as program
from dsv3_jax.r1.arguments import NAMES, parse_r1
from dsv3_jax.r1.pipeline import Pipeline, StageError, StoppedError
from dsv3_jax.r1.report import write_report
from dsv3_jax.training.resume import write_config

FIGURES = {
    "problems": 4,
    "greedy": {"pass_at": {"1": 0.5}, "rewards": {"accuracy": 0.5, "format": 1.0}, "tokens": 3.0},
    "sampled": {"pass_at": {"1": 0.25, "8": 0.75}, "rewards": {"accuracy": 0.25, "format": 0.5}, "tokens": 4.0},
}


class Player:
    """Takes the place of the processes: writes what each would leave behind, and keeps the commands."""

    def __init__(self, traces: str = "{}\n", until: str = ""):
        self.commands: list[tuple[str, dict[str, str | None]]] = []
        self._traces, self._until = traces, until

    def play(self, what: str, arguments: Sequence[str], read: bool = False) -> str:
        options = dict(option_pairs([argument for argument in arguments if argument.startswith("--")]))
        self.commands.append(("train" if arguments[0].endswith("train.py") else "ask", options))
        if self.commands[-1][0] == "ask":
            if options.get("save"):
                Path(options["save"]).write_text(self._traces)
            return json.dumps(FIGURES) if read else ""
        workdir = Path(options["workdir"])
        workdir.mkdir(parents=True, exist_ok=True)
        if workdir.name != self._until:
            (workdir / "summary.json").write_text('{"seconds": 60.0}')
        return ""

    def trained(self) -> list[dict[str, str | None]]:
        return [options for kind, options in self.commands if kind == "train"]


@pytest.fixture
def played(tmp_path, monkeypatch) -> Callable[..., Player]:
    """`played(*options)`: the pipeline of tmp_path with these options, its commands played."""

    def run(*options: str, player: Player | None = None) -> Player:
        player = player or Player()
        monkeypatch.setattr(Pipeline, "_command", player.play)
        Pipeline(parse_r1([f"--folder={tmp_path}", *options]), lambda: False).run()
        return player

    return run


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_has_a_config_that_makes_a_run(name: str):
    check(load_config(f"tiny_r1_{name}"))


def test_every_stage_starts_and_learns_from_what_the_paper_says(played, tmp_path):
    """R1 section 2 and figure 2: cold start and rejection sampling both begin with the base model again."""
    runs = {options["config"].removeprefix("tiny_r1_"): options for options in played().trained()}
    assert list(runs) == list(NAMES)
    starts = {name: Path(run["init"]).name for name, run in runs.items() if "init" in run}
    assert starts == {
        "zero": "base",
        "cold_start": "base",
        "reasoning": "cold_start",
        "rejection": "base",
        "final": "rejection",
        "student_traces": "student",
        "student_logits": "student",
        "student_grpo": "student",
    }
    learns_from = {name: Path(run["data.path"]).name for name, run in runs.items() if "data.path" in run}
    assert learns_from == {
        "cold_start": "cold_start.jsonl",
        "rejection": "rejection.jsonl",
        "student_traces": "rejection.jsonl",
        "student_logits": "rejection.jsonl",
    }
    assert runs["student"]["data.tokenizer"] == str(tmp_path / "base" / "tokenizer.json")
    assert runs["student_logits"]["loss.teacher"] == str(tmp_path / "final")


def test_traces_are_of_the_right_model_on_training_problems_and_made_once(played, tmp_path):
    commands = played("--cold_start_problems=5", "--rejection_problems=7", "--samples=3").commands
    traces = [options for kind, options in commands if kind == "ask" and "save" in options]
    assert [Path(options["checkpoint"]).name for options in traces] == ["zero", "reasoning"]
    assert [options["problems"] for options in traces] == ["5", "7"]
    assert {(options["split"], options["samples"]) for options in traces} == {("train", "3")}
    assert [options["least_thinking"] for options in traces] == ["1", "0"]
    evaluated = [Path(options["checkpoint"]).name for kind, options in commands if "json" in options]
    assert evaluated == list(NAMES)


def test_options_go_to_their_stage_or_to_all(played):
    runs = played("--seed=3", "--zero.training.log_interval=7", "--checkpoint.keep=2").trained()
    assert {run["seed"] for run in runs} == {"3"} and {run["checkpoint.keep"] for run in runs} == {"2"}
    assert [run["config"] for run in runs if "training.log_interval" in run] == ["tiny_r1_zero"]


def test_what_is_done_is_not_done_again(played):
    with pytest.raises(StoppedError, match="stopped in stage reasoning: the same command goes on"):
        played(player=Player(until="reasoning"))
    rest = played().trained()
    assert [run["config"].removeprefix("tiny_r1_") for run in rest] == list(NAMES)[NAMES.index("reasoning") :]
    assert played().commands == []


def test_a_model_is_asked_alike_whatever_the_last_stage_to_run_is(played):
    """As R1-Zero is in its rollouts, so that figures can be compared."""
    (_, first), (_, other) = (played(f"--until={last}").commands[-1] for last in ("base", "zero"))
    assert first["max_new_tokens"] == other["max_new_tokens"] == str(load_config("tiny_r1_zero").grpo.max_new_tokens)


def test_a_base_from_elsewhere_takes_the_place_of_the_stage(played, tmp_path):
    base = tmp_path / "mine"
    base.mkdir()
    commands = played(f"--base={base}", "--until=zero").commands
    assert [options["config"] for kind, options in commands if kind == "train"] == ["tiny_r1_zero"]
    (asked, of_zero) = (options for kind, options in commands if kind == "ask")
    assert asked["checkpoint"] == str(base) and asked["task.kind"] == "arithmetic" and "task.kind" not in of_zero
    assert commands[1][1]["init"] == str(base)


def test_without_a_right_response_there_are_no_traces_to_learn_from(played, tmp_path):
    with pytest.raises(StageError, match="stage zero answered none of 1000 training problems"):
        played(player=Player(traces=""))
    assert not (tmp_path / "cold_start.jsonl").exists()


def test_the_report_has_a_line_a_model(played, tmp_path):
    played("--until=zero")
    pipeline = Pipeline(parse_r1([f"--folder={tmp_path}", "--until=zero"]), lambda: False)
    lines = write_report(tmp_path, pipeline.figures()).splitlines()
    assert lines[0].split() == ["stage", "greedy", "pass@1", "pass@8", "format", "tokens", "seconds"]
    assert lines[2].split() == ["zero", "0.500", "0.250", "0.750", "0.500", "4.0", "60"] and len(lines) == 3
    assert json.loads((tmp_path / "summary.json").read_text())[1]["pass@8"] == 0.75


def test_a_command_that_fails_ends_it_and_says_which(tmp_path):
    pipeline = Pipeline(parse_r1([f"--folder={tmp_path}", "--until=base"]), lambda: False)
    with pytest.raises(StageError, match="stage 1 of 1, base, ended with exit code 3"):
        pipeline._command("stage 1 of 1, base", ["-c", "raise SystemExit(3)"])


def test_a_signal_is_handed_on_and_waited_for(tmp_path):
    """The process that is told to end takes its time, as one that saves a checkpoint does."""
    slow = "import signal, sys, time\n"
    slow += f"def end(*_): time.sleep(0.3); open({str(tmp_path / 'saved')!r}, 'w'); sys.exit(1)\n"
    slow += f"signal.signal(signal.SIGTERM, end); open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(600)"
    pipeline = Pipeline(parse_r1([f"--folder={tmp_path}", "--until=base"]), (tmp_path / "ready").exists)
    with pytest.raises(StoppedError, match="stopped in traces of zero"):
        pipeline._command("traces of zero", ["-c", slow])
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--until=zeroth"], "--until=zeroth is no stage to run (did you mean zero?)"),
        (["--base=.", "--until=base"], "--until=base is no stage to run; there are zero, cold_start"),
        (["--configs=tiny_r2"], "--config=tiny_r2_base does not exist"),
        (["--samples=0"], "--samples=0 must be at least 1"),
        (["--base=absent"], "--base=absent is no folder with a model"),
        (["--folders=x"], "--folders is not an option (did you mean --folder?)"),
        (["--zero.grpo.group_size=1"], "stage zero: grpo.group_size"),
        (["--zero.grpo.clip=1"], "stage zero: --grpo.clip is not an option"),
        (["--model.widht=1"], "stage base: --model.widht is not an option"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_runs(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["r1", f"--folder={tmp_path / 'run'}", *options])
    monkeypatch.setattr(Pipeline, "_command", lambda *_, **__: pytest.fail("a command was run"))
    with pytest.raises(SystemExit) as caught:
        run_main(program.main)
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_stage_that_was_begun_otherwise_is_not_gone_on_with(played, tmp_path):
    played("--until=base")
    write_config(tmp_path / "base", load_config("tiny_r1_base"))
    with pytest.raises(Exception, match="stage base: .*seed"):
        played("--until=base", "--seed=1")
