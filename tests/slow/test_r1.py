"""The R1 pipeline as a user runs it: every stage in its process, stopped in the middle, gone on with to the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.r1.arguments import NAMES
from dsv3_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
# Sums of two digits, of which a very small model learns enough in seconds to be right now and then.
EVERYWHERE = """
    --model.width=32 --model.layers=2 --model.dense_ffn_width=48 --model.heads=2 --model.query_latent=16
    --model.key_value_latent=16 --model.nope_head_dim=8 --model.value_head_dim=8 --model.expert_ffn_width=16
    --task.arithmetic_digits=1 --task.arithmetic_least_digits=1 --task.validation_problems=2
    --task.held_out_problems=4 --training.log_interval=1 --training.sample_tokens=0
""".split()
CHATS = "base cold_start rejection student student_traces student_logits".split()
ROLLOUTS = "zero reasoning final student_grpo".split()
OPTIONS = [
    *EVERYWHERE,
    *(f"--{stage}.training.tokens={tokens}" for stage in CHATS for tokens in (200_000 if stage == "base" else 20_000,)),
    *(f"--{stage}.data.demonstrations=400" for stage in ("base", "student")),
    # It always works a sum out: were answers alone likely enough, R1-Zero could leave no other right ones for traces.
    "--base.data.answers_only=0",
    "--base.data.formless=0.2",
    *(
        f"--{stage}.{option}"
        for stage in ROLLOUTS
        for option in (
            *("training.tokens=20480", "training.batch_size=32", "training.sequence_length=64"),
            *("training.microbatches=2", "grpo.prompts=8", "grpo.group_size=4", "grpo.max_new_tokens=32"),
            "training.validation_interval=5",
        )
    ),
    *("--cold_start_problems=60", "--rejection_problems=60"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """One compilation cache: stages of one shape run one program."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla"))}


def begun(arguments: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def untimed(workdir: Path) -> list[dict[str, Any]]:
    entries = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in entry.items() if "seconds" not in name} for entry in entries]


def test_stopped_in_the_middle_it_goes_on_to_the_end_as_if_it_had_not_been(tmp_path, environment):
    folder, log = tmp_path / "run", tmp_path / "log"
    command = ["-m", "dsv3_jax.r1", f"--folder={folder}", *OPTIONS]
    process = begun(command, environment, log)
    metrics = folder / "zero" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130, log.read_text()
    assert "stopped in stage zero: the same command goes on from there" in log.read_text()
    assert not (folder / "zero" / "summary.json").exists()

    process = begun(command, environment, log)
    assert process.wait() == 0, log.read_text()
    rows = json.loads((folder / "summary.json").read_text())
    assert [row["stage"] for row in rows] == list(NAMES)
    assert all(0 <= row["greedy"] <= 1 and row["tokens"] > 0 for row in rows)
    for traces in ("cold_start", "rejection"):
        chats = [json.loads(line)["messages"] for line in (folder / f"{traces}.jsonl").read_text().splitlines()]
        assert all("<answer>" in said["content"] for _, said in chats)
        assert traces == "rejection" or not any("<think></think>" in said["content"] for _, said in chats)

    alone = ["train.py", "--config=tiny_r1_zero", f"--init={folder / 'base'}", f"--workdir={tmp_path / 'alone'}"]
    of_zero = [option.replace("--zero.", "--") for option in OPTIONS if option.startswith("--zero.")]
    process = begun([*alone, *EVERYWHERE, *of_zero], environment, log)
    assert process.wait() == 0, log.read_text()
    assert untimed(tmp_path / "alone") == untimed(folder / "zero")
