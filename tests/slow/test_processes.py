"""Runs of several processes on one machine: the run of one process, stopped together, taken up again."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import train
from dsv3_jax.training.checkpoint import complete_steps
from dsv3_jax.training.metrics import read_metrics

ROOT = Path(train.__file__).parent
SECONDS = 180
VERY_SMALL = """
    --config=tiny --model.vocabulary=320 --model.width=32 --model.layers=1 --model.dense_layers=0 --model.mtp_depth=0
    --model.heads=2
    --model.query_latent=16 --model.key_value_latent=16 --model.nope_head_dim=8 --model.rope_head_dim=8
    --model.value_head_dim=8 --model.experts=8 --model.experts_per_token=2 --model.expert_ffn_width=16
    --model.expert_groups=4 --training.sequence_length=32 --training.batch_size=8 --training.tokens=3072
    --training.log_interval=1 --training.sample_tokens=0 --checkpoint.interval=3 --data.validation_share=0.3
    --data.streams=2 --mesh.data=1 --mesh.fsdp=2 --mesh.expert=4
""".split()

Start = Callable[..., list[subprocess.Popen]]


@pytest.fixture(scope="module")
def start(texts, tmp_path_factory) -> Start:
    """`start(workdir, processes, *options)`: the processes of a run, of eight devices together."""
    cache = tmp_path_factory.mktemp("xla")

    def of_run(workdir: Path, processes: int, *options: str, only: dict[int, str] | None = None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(8 // processes),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        }
        started = []
        for index in range(processes):
            joined = [f"--process.coordinator=localhost:{port}", f"--process.count={processes}"]
            of_process = [*joined, f"--process.index={index}"] if processes > 1 else []
            own = [only[index]] if only and index in only else []
            command = [sys.executable, "train.py", *VERY_SMALL, f"--data.path={texts}", f"--workdir={workdir}"]
            started.append(
                subprocess.Popen(
                    [*command, *options, *of_process, *own],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )  # fmt: skip
            )
        return started

    return of_run


def _ended(processes: list[subprocess.Popen], *codes: int) -> list[str]:
    """What each wrote to stderr."""
    errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    assert [process.returncode for process in processes] == list(codes), errors
    return errors


def _numbers(workdir: Path) -> dict[str, np.ndarray]:
    """Every number of every logged step that is not a speed."""
    steps = [entry for entry in read_metrics(workdir / "metrics.jsonl") if "loss" in entry]
    names = [name for name in steps[0] if name not in ("tokens_per_second", "matmul_rate_share")]
    return {name: np.array([step[name] for step in steps], float) for name in names}


def _assert_as_one(alone: Path, together: Path) -> None:
    """A run of one process, and one of several, in every number."""
    wanted, found = _numbers(alone), _numbers(together)
    assert wanted.keys() == found.keys() and len(wanted["loss"]) == 12
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def together(start, tmp_path_factory) -> Path:
    """A run of two processes, to its end."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    _ended(start(workdir, 2), 0, 0)
    return workdir


def test_two_processes_train_as_one(start, together, tmp_path):
    _ended(start(tmp_path / "run", 1), 0)
    _assert_as_one(tmp_path / "run", together)
    # Process 0 alone writes what a run has one of.
    assert (together / "summary.json").exists() and (together / "loss.png").exists()


def test_two_processes_train_in_fp8_as_one(start, tmp_path):
    fp8 = "--model.precision=fp8"
    _ended(start(tmp_path / "alone", 1, fp8), 0)
    _ended(start(tmp_path / "together", 2, fp8), 0, 0)
    _assert_as_one(tmp_path / "alone", tmp_path / "together")


def test_when_one_dies_the_other_stops_at_once_and_the_run_goes_on_from_its_checkpoint(start, together, tmp_path):
    workdir = tmp_path / "run"
    first, second = start(workdir, 2)
    began = time.monotonic()
    while not complete_steps(workdir / "checkpoints"):
        assert first.poll() is None and second.poll() is None and time.monotonic() < began + SECONDS
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    _, errors = first.communicate(timeout=SECONDS)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "process 1 of 2 has stopped" in line and "the same command goes on from the last checkpoint" in line
    assert first.returncode == 1 and "Traceback" not in errors
    second.communicate()
    assert not (workdir / "summary.json").exists()
    _ended(start(workdir, 2), 0, 0)
    resumed, whole = _numbers(workdir), _numbers(together)
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values, err_msg=name)


def test_a_signal_to_one_stops_all_at_the_same_step(start, tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir, 2, "--training.tokens=3072000")
    began = time.monotonic()
    while not complete_steps(workdir / "checkpoints"):
        assert processes[0].poll() is None and time.monotonic() < began + SECONDS
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)
    _ended(processes, 0, 0)
    logged = [entry["step"] for entry in read_metrics(workdir / "metrics.jsonl")]
    assert complete_steps(workdir / "checkpoints")[-1] == max(logged)


def test_processes_that_were_given_different_options_say_which(start, tmp_path):
    different = {1: "--optimizer.learning_rate=0.125"}
    for errors in _ended(start(tmp_path / "run", 2, only=different), 2, 2):
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert "optimizer.learning_rate: process 0 has 0.005, process 1 0.125" in line and "Traceback" not in errors
    assert not (tmp_path / "run" / "config.json").exists()
