"""Whole runs of `train.py --config=tiny_grpo`: verifiers that hang and die, resuming bit for bit, bad input."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import train
from dsv3_jax.command_line import parse_train, run_main
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.layout import mesh_of
from dsv3_jax.model.functional import skeleton_of
from dsv3_jax.posttraining import rollout
from dsv3_jax.posttraining.grpo_state import abstract_grpo_state
from dsv3_jax.tasks.problem import Verdict, verdict_on
from dsv3_jax.tasks.verifier_process import VerifierFailure, VerifierPool
from dsv3_jax.training.checkpoint import Checkpoints, complete_steps, restore_part
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.state import initial_state
from sharding.mesh import one_device

JUDGE = """
import os, time

def judge(prompt, response):
    if prompt == "hang":
        time.sleep(1e6)
    if prompt == "die":
        os._exit(3)
    return float(len(response) % 2)
"""

HANGS, DIES = 3, 12
OPTIONS = """
    --model.width=16 --model.layers=2 --model.dense_layers=0 --model.heads=2 --model.query_latent=8
    --model.key_value_latent=8 --model.nope_head_dim=4 --model.rope_head_dim=4 --model.value_head_dim=4
    --model.expert_ffn_width=8 --model.maximum_positions=128 --loss.mtp_weight=0 --loss.mtp_late_weight=0
    --training.tokens=2048 --training.batch_size=8 --training.sequence_length=32 --training.microbatches=2
    --training.validation_interval=4 --checkpoint.interval=3 --optimizer.learning_rate=1e-2
    --grpo.prompts=8 --grpo.group_size=2 --grpo.updates_per_rollout=2 --grpo.prompt_tokens=16 --grpo.max_new_tokens=12
    --grpo.kl_weight=0.05 --grpo.kl_in=reward --grpo.reference_interval=4 --grpo.overlong_penalty=0.1
""".split()


@dataclass(frozen=True)
class Parity:
    """A response is right if its length is odd."""

    prompt: str
    judge: Callable[[str, str], float]

    def verify(self, response: str) -> Verdict:
        try:
            return verdict_on(True, self.judge(self.prompt, response))
        except VerifierFailure as failure:
            return verdict_on(True, 0.0, str(failure))


class ParityTask:
    def __init__(self, judge: Callable[[str, str], float]):
        self._judge = judge
        self.validation: Sequence[Parity] = [Parity(f"v {index}", judge) for index in range(3)]
        self.held_out: Sequence[Parity] = [Parity(f"h {index}", judge) for index in range(9)]

    def problem(self, index: int) -> Parity:
        return Parity({HANGS: "hang", DIES: "die"}.get(index, f"t {index}"), self._judge)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory) -> Iterator[None]:
    """One compilation cache for all runs."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0.1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, task):
    """One of the devices, and the task with the verifier that hangs."""
    monkeypatch.setattr(train, "mesh_of", lambda config, skeleton: mesh_of(config, skeleton, jax.devices()[:1]))
    monkeypatch.setattr(rollout.tasks, "build", lambda config: task)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> ParityTask:
    file = tmp_path_factory.mktemp("judge") / "judge.py"
    file.write_text(JUDGE)
    return ParityTask(VerifierPool(file, "judge", processes=4, seconds=3.0).call)


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory) -> Path:
    """A workdir whose checkpoint a run can start from."""
    workdir = tmp_path_factory.mktemp("start")
    config = parse_train(["--config=tiny_grpo", *OPTIONS]).config
    checkpoints = Checkpoints(workdir / "checkpoints", config, tokenizer.to_str())
    checkpoints.save(1, initial_state(config, skeleton_of(config.model), one_device()), {})
    checkpoints.close()
    return workdir


def run(workdir: Path, start: Path, *more: str, rollouts: int | None = None) -> None:
    """The run in this process, interrupted after so many rollouts."""
    arguments = parse_train(["--config=tiny_grpo", *OPTIONS, f"--init={start}", f"--workdir={workdir}", *more])
    asked = iter(range(1, 100))
    train.learn_from_rollouts(arguments, lambda: next(asked) == rollouts)


@pytest.fixture(scope="module")
def uninterrupted(start, task, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "mesh_of", lambda config, skeleton: mesh_of(config, skeleton, jax.devices()[:1]))
        patch.setattr(rollout.tasks, "build", lambda config: task)
        run(workdir, start)
    return workdir


def untimed(workdir: Path) -> list[dict[str, Any]]:
    entries = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in entry.items() if "seconds" not in name} for entry in entries]


def last_state(workdir: Path) -> Any:
    config = parse_train(["--config=tiny_grpo", *OPTIONS]).config
    abstract = abstract_grpo_state(config, skeleton_of(config.model), one_device())
    return restore_part(workdir / "checkpoints" / "8", abstract, whole=True)


def test_a_verifier_that_hangs_or_dies_costs_its_responses_alone(uninterrupted):
    entries = untimed(uninterrupted)
    assert [entry["step"] for entry in entries] == [0, 2, 4, 6, 8]
    assert [entry["verifier_failures"] for entry in entries[1:]] == [2, 2, 0, 0]
    assert json.loads((uninterrupted / "summary.json").read_text())["held_out_problems"] == 9


def test_what_a_run_leaves_behind(uninterrupted):
    assert {path.name for path in uninterrupted.iterdir()} == {
        *("config.json", "tokenizer.json", "metrics.jsonl", "tensorboard", "checkpoints", "grpo.png", "summary.json")
    }
    entries = untimed(uninterrupted)
    splits = {"held_out_pass_at_1", "held_out_pass_at_2", "held_out_greedy_pass_at_1", "validation_pass_at_1"}
    assert splits <= entries[0].keys()
    assert "validation_pass_at_2" in entries[2] and "validation_pass_at_1" not in entries[1]
    for entry in entries[1:]:
        assert 0 <= entry["mixed_groups"] <= 1 and entry["mixed_groups"] * 8 + entry["zero_variance_groups"] == 8
        assert entry["mismatch"] < 1e-5 and entry["entropy"] > 0 and 0 <= entry["truncated"] <= 1
        assert entry["reward"] <= 2 and entry["gradient_norm"] > 0
    # The reference is the first policy until step 4, and a later one has moved away from it.
    assert entries[2]["kl"] > 0 and any(entry["ratio"] != 1.0 for entry in entries[1:])
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["held_out_pass_at_1_before"] == entries[0]["held_out_pass_at_1"]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(uninterrupted, start, tmp_path):
    """Stopped after the reference has been refreshed."""
    workdir = tmp_path / "run"
    run(workdir, start, rollouts=3)
    assert complete_steps(workdir / "checkpoints")[-1] == 6 and not (workdir / "summary.json").exists()
    run(workdir, start)
    assert untimed(workdir) == untimed(uninterrupted)
    for one, other in zip(
        jax.tree.leaves(last_state(workdir)), jax.tree.leaves(last_state(uninterrupted)), strict=True
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_run_that_has_ended_shows_its_figures_again(uninterrupted, start, capsys):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    run(uninterrupted, start)
    assert "This run has ended" in capsys.readouterr().out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grpo.group_size=1", "--grpo.prompts=16"], "grpo.group_size, whose responses are compared with each"),
        (["--grpo.prompts=4"], "training.batch_size=8, the responses of an update, times"),
        (["--grpo.max_new_tokens=20"], "training.sequence_length=32 must be at least 35"),
        (["--grpo.prompt_tokens=3"], "grpo.prompt_tokens=3 must be at least"),
        (["--grpo.temperature=0"], "grpo.temperature=0.0 must be above 0"),
        (["--training.tokens=2304"], "training.tokens=2304 makes 9 updates, which must be a multiple of"),
        (["--data.tokenizer=OTHER"], "is not the tokenizer of --init="),
        (["--init=NONE"], "data.kind=rollouts needs --init=DIR"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(start, tmp_path, capsys, options, message):
    if "--data.tokenizer=OTHER" in options:
        train_tokenizer(["zz yy xx ww " * 50], 300).save(str(tmp_path / "other.json"))
        options = [f"--data.tokenizer={tmp_path / 'other.json'}"]
    given = ["--config=tiny_grpo", *OPTIONS, f"--init={start}", f"--workdir={tmp_path / 'run'}", *options]
    if "--init=NONE" in options:
        given = [option for option in given if not option.startswith("--init")]
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: train.learn_from_rollouts(parse_train(given), lambda: False))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert caught.value.code in (1, 2) and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run").exists()
