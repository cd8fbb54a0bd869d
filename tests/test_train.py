"""Whole runs of train.py: what they leave behind, how they resume bit for bit, how they fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tokenizers import Tokenizer, models

import train
from dsv3_jax.command_line import parse_train, run_main
from dsv3_jax.config import from_json
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.layout import mesh_of
from dsv3_jax.model.functional import skeleton_of
from dsv3_jax.training.checkpoint import complete_steps, open_checkpoint, restore_part
from dsv3_jax.training.loop import LoopResult
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.state import TrainState, abstract_state
from sharding.mesh import one_device

ROOT = Path(train.__file__).parent
STEPS = 16
KILLED_AT = 11
VERY_SMALL = """
    --model.vocabulary=300 --model.width=32 --model.layers=2 --model.dense_ffn_width=32 --model.heads=2
    --model.query_latent=16 --model.key_value_latent=16 --model.nope_head_dim=8 --model.rope_head_dim=8
    --model.value_head_dim=8 --model.experts=4 --model.experts_per_token=2 --model.expert_ffn_width=16
    --model.expert_groups=2 --training.sequence_length=32 --training.batch_size=2 --training.tokens=1024
    --training.log_interval=1 --training.validation_interval=6 --training.sample_tokens=8 --checkpoint.interval=4
    --data.validation_share=0.3
""".split()
TIMED = {"tokens_per_second", "matmul_rate_share"}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory) -> Iterator[Path]:
    """One compilation cache for the runs in this process and those beside it."""
    folder, names = tmp_path_factory.mktemp("xla"), ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    for name, value in zip(before, (str(folder), 0.1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def options(texts) -> Callable[..., list[str]]:
    def make(workdir: Path, *more: str) -> list[str]:
        return ["--config=tiny", *VERY_SMALL, f"--data.path={texts}", f"--workdir={workdir}", *more]

    return make


@pytest.fixture(scope="module")
def start(compiled_once) -> Callable[..., subprocess.Popen]:
    """Start `python train.py` with these options, or `python -c program` with them."""

    def popen(options: list[str], program: str | None = None) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *(["-c", program] if program else ["train.py"]), *options],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(compiled_once)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


@pytest.fixture(scope="module")
def uninterrupted(options, start, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run = start(options(workdir))
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    return workdir


@pytest.fixture(scope="module")
def stopped(uninterrupted, options, start, tmp_path_factory) -> Path:
    """The same run after SIGTERM, which arrives before its first step has been compiled."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    run = start(options(workdir))
    while not (workdir / "config.json").exists() and run.poll() is None:
        time.sleep(0.01)
    run.terminate()
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    (step,) = complete_steps(workdir / "checkpoints")
    assert step < STEPS // 2 and not (workdir / "summary.json").exists()
    return workdir


@pytest.fixture(autouse=True)
def one_device_here(monkeypatch):
    """Runs in this process use one of its devices, as those in processes of their own have one."""
    monkeypatch.setattr(train, "mesh_of", lambda config, skeleton: mesh_of(config, skeleton, jax.devices()[:1]))


def _in_process(options: list[str], capsys) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of the run, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: train.train(parse_train(options), lambda: False))
    return caught.value.code, capsys.readouterr().err.splitlines()


def _error(lines: list[str]) -> str:
    """The one line that says what was wrong, after whatever the run told before it."""
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert line == lines[-1] and not any("Traceback" in each for each in lines)
    return line


def _copy(workdir: Path, to: Path) -> Path:
    return Path(shutil.copytree(workdir, to / "run"))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _final_state(workdir: Path) -> TrainState:
    saved = open_checkpoint(workdir)
    abstract = abstract_state(saved.config, skeleton_of(saved.config.model), one_device())
    return restore_part(saved.directory, abstract, whole=True)


def _assert_same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def _untimed(workdir: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in entry.items() if name not in TIMED}
        for entry in read_metrics(workdir / "metrics.jsonl")
    ]


def test_a_run_leaves_all_it_promises(uninterrupted):
    assert from_json((uninterrupted / "config.json").read_text()).model.width == 32
    entries = read_metrics(uninterrupted / "metrics.jsonl")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    named = "step loss mtp_loss balance_loss gradient_norm learning_rate tokens_per_second matmul_rate_share"
    for entry in steps:
        assert entry.keys() == {*named.split(), "max_violation", "load_entropy", "dropped_tokens"}
        assert entry["dropped_tokens"] == 0 and len(entry["max_violation"]) == len(entry["load_entropy"]) == 2
    assert [entry["step"] for entry in entries if "validation_loss" in entry] == [6, 12]
    assert abs(steps[0]["loss"] - np.log(300)) < 0.1 and steps[-1]["loss"] < 5.5
    assert steps[-1]["tokens_per_second"] > 0 and steps[-1]["matmul_rate_share"] > 0

    (events,) = (uninterrupted / "tensorboard").iterdir()
    assert "tfevents" in events.name and events.stat().st_size > 100 * STEPS
    assert complete_steps(uninterrupted / "checkpoints") == [12, 16]
    for picture in ("loss.png", "expert_load.png"):
        assert (uninterrupted / picture).read_bytes().startswith(b"\x89PNG")
    assert not list(uninterrupted.rglob("*.tmp"))


def test_the_summary_says_what_the_run_reached(uninterrupted, texts):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    promised = (
        "validation_bits_per_byte zlib_bits_per_byte xz_bits_per_byte tokens seconds tokens_per_second "
        "matmul_rate_share parameters"
    )
    assert set(promised.split()) <= summary.keys()
    assert all(summary[name] > 0 for name in promised.split())
    assert summary["tokens"] == STEPS * 2 * 32
    state = _final_state(uninterrupted)
    assert summary["parameters"] == sum(leaf.size for leaf in jax.tree.leaves((state.parameters, state.router_bias)))
    # An untrained model spends log2(300) bits a token; a token of these texts stands for two bytes or more.
    assert summary["validation_bits_per_byte"] < np.log2(300) / 2


def test_a_run_stopped_and_killed_ends_as_the_uninterrupted_one(uninterrupted, stopped, options, start, tmp_path):
    workdir = _copy(stopped, tmp_path)
    killed_in_a_step = f"""
        import os, signal
        import train
        from dsv3_jax.training.metrics import MetricsLog

        def log(self, step, values, log=MetricsLog.log):
            log(self, step, values)
            if step == {KILLED_AT}:
                os.kill(os.getpid(), signal.SIGKILL)

        MetricsLog.log = log
        train.main()
        """
    killed = start(options(workdir), textwrap.dedent(killed_in_a_step))
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert 0 < complete_steps(workdir / "checkpoints")[-1] < KILLED_AT
    assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] == KILLED_AT

    again = start(options(workdir))
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert _untimed(workdir) == _untimed(uninterrupted)
    _assert_same_bits(_final_state(workdir), _final_state(uninterrupted))
    summary, expected = (json.loads((run / "summary.json").read_text()) for run in (workdir, uninterrupted))
    assert summary["validation_loss"] == expected["validation_loss"]


def test_running_a_finished_command_again_changes_no_figure(uninterrupted, options, tmp_path, capsys):
    workdir = _copy(uninterrupted, tmp_path)
    code, errors = _in_process(options(workdir), capsys)
    assert code == 0, errors
    assert _untimed(workdir) == _untimed(uninterrupted)
    for name in ("summary.json", "expert_load.png", "loss.png"):
        assert (workdir / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    _assert_same_bits(_final_state(workdir), _final_state(uninterrupted))


def test_a_full_disk_ends_the_run_with_one_line_and_the_last_checkpoint(stopped, options, start, tmp_path):
    workdir = _copy(stopped, tmp_path)
    (good,) = complete_steps(workdir / "checkpoints")
    state = _final_state(workdir)
    # A process of its own: asyncio's remains of the failed writes are collected at any later moment.
    full_disk = """
        import resource
        import train
        from dsv3_jax.command_line import run_main

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        run_main(train.main)
    """
    run = start(options(workdir), textwrap.dedent(full_disk))
    _, errors = run.communicate()
    line = _error(errors.splitlines())
    assert run.returncode == 1 and str(workdir) in line and "File too large" in line
    assert f"step {good} is the last good one" in line
    assert complete_steps(workdir / "checkpoints") == [good]
    _assert_same_bits(_final_state(workdir), state)


def test_a_nan_stops_the_run_names_its_tensor_and_keeps_the_checkpoint(stopped, options, tmp_path, monkeypatch, capsys):
    workdir = _copy(stopped, tmp_path)
    (good,) = complete_steps(workdir / "checkpoints")
    before, first_state = _files(workdir / "checkpoints"), train.first_state

    def poisoned(*arguments: Any) -> tuple[TrainState, Any]:
        state, data_state = first_state(*arguments)
        gain = state.parameters["norm"]["gain"]
        state.parameters["norm"]["gain"] = gain.at[3].set(jnp.nan)
        return state, data_state

    monkeypatch.setattr(train, "first_state", poisoned)
    code, errors = _in_process(options(workdir), capsys)
    assert code == 1 and f"step {good + 1} is not finite: parameter norm.gain has a NaN" in _error(errors)
    assert _files(workdir / "checkpoints") == before
    assert all("NaN" not in text for text in (workdir / "metrics.jsonl").read_text().splitlines())


@pytest.fixture
def no_steps(monkeypatch) -> list[TrainState]:
    """Runs that end before their first step; the states they would have begun with."""
    started: list[TrainState] = []

    def stop_at_once(state: TrainState, *_: Any) -> LoopResult:
        started.append(state)
        return LoopResult(state, False, 0.0, 0, [])

    monkeypatch.setattr(train, "run_steps", stop_at_once)
    monkeypatch.setattr(train, "compile_train_step", lambda *_: None)
    return started


def _tokenizer_without_special_tokens(path: Path) -> None:
    Tokenizer(models.BPE({"a": 0, "</s>": 1}, [])).save(str(path))


def _tokenizer_without_fill_in_the_middle(path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))


@pytest.fixture
def bad(tmp_path) -> Path:
    """A folder of inputs that cannot be used."""
    folder = tmp_path / "bad"
    (folder / "empty").mkdir(parents=True)
    (folder / "empty_files").mkdir()
    (folder / "empty_files/a.txt").write_text("")
    (folder / "binary").mkdir()
    (folder / "binary/a.txt").write_bytes(bytes(range(128, 256)) * 10)
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "broken.json").write_text("{")
    (folder / "a_file").write_text("")
    train_tokenizer(["one two three four five six seven eight"] * 9, 290).save(str(folder / "large.json"))
    _tokenizer_without_special_tokens(folder / "endless.json")
    _tokenizer_without_fill_in_the_middle(folder / "no_fim.json")
    return folder


@pytest.mark.parametrize(
    ("option", "code", "part"),
    [
        ("--config=tiiny", 2, "did you mean tiny?"),
        ("--model.widht=32", 2, "did you mean --model.width?"),
        ("--model.experts_per_token=5", 2, "model.experts_per_token=5"),
        ("--model.expert_groups=3", 2, "model.expert_groups=3"),
        ("--model.rope_head_dim=7", 2, "model.rope_head_dim=7"),
        ("--data.path={bad}/absent", 1, "/absent' does not exist"),
        ("--data.path={bad}/empty", 1, "/empty"),
        ("--data.path={bad}/empty_files", 1, "/empty_files"),
        ("--data.path={bad}/binary", 1, "binary/a.txt"),
        ("--data.path={bad}/image.png", 1, ".txt .py .md"),
        ("--data.tokenizer={bad}/absent.json", 1, "absent.json"),
        ("--data.tokenizer={bad}/broken.json", 1, "broken.json"),
        ("--data.tokenizer={bad}/large.json", 2, "model.vocabulary=280 must be at least 290"),
        ("--data.tokenizer={bad}/endless.json", 1, "no end-of-text token"),
        ("--data.tokenizer={bad}/no_fim.json", 2, "data.fill_in_the_middle_rate=0.1"),
        ("--init={bad}/absent", 1, "holds no checkpoint"),
        ("--init={other_shape}", 2, "model.vocabulary"),
        ("--model.vocabulary=200", 2, "model.vocabulary=200 must be at least 266"),
        ("--workdir={bad}/a_file", 2, "a_file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_trace(
    option, code, part, bad, uninterrupted, options, no_steps, tmp_path, capsys
):
    workdir = tmp_path / "run"
    before = _files(bad)
    mistaken = option.format(bad=bad, other_shape=uninterrupted)
    exit_code, errors = _in_process(options(workdir, "--model.vocabulary=280", mistaken), capsys)
    assert part in _error(errors) and exit_code == code
    assert not workdir.exists() and _files(bad) == before and not no_steps


def test_the_workdir_of_another_model_is_refused_and_left_alone(uninterrupted, options, start, tmp_path):
    workdir = _copy(uninterrupted, tmp_path)
    run = start(options(workdir, "--model.width=48"))
    output, errors = run.communicate()
    line = _error(errors.splitlines())
    assert line.startswith("error: model.width: ") and "has 32, this command 48" in line
    assert (run.returncode, output) == (2, "")
    assert _files(workdir) == _files(uninterrupted)


def test_a_mistake_corrected_runs_in_the_same_workdir(bad, options, no_steps, tmp_path, capsys):
    without_fim = options(tmp_path / "run", f"--data.tokenizer={bad}/no_fim.json")
    assert _in_process(without_fim, capsys)[0] == 2
    code, errors = _in_process([*without_fim, "--data.fill_in_the_middle_rate=0"], capsys)
    assert code == 0, errors
    assert len(no_steps) == 1


@pytest.mark.parametrize("source", ["", "checkpoints/12"])
def test_init_starts_a_new_run_from_the_parameters_of_another(
    source, uninterrupted, options, no_steps, tmp_path, capsys
):
    workdir = tmp_path / "run"
    from_other = options(workdir, f"--init={uninterrupted / source}")
    assert _in_process(from_other, capsys)[0] == 0
    expected = _final_state(uninterrupted)
    if source:
        expected = restore_part(uninterrupted / source, expected, whole=True)
    (state,) = no_steps
    _assert_same_bits(
        {"parameters": state.parameters, "router_bias": state.router_bias},
        {"parameters": expected.parameters, "router_bias": expected.router_bias},
    )
    assert int(state.step) == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))
    tokenizers = [json.loads((run / "tokenizer.json").read_text()) for run in (workdir, uninterrupted)]
    assert tokenizers[0] == tokenizers[1]


def test_a_corpus_without_held_out_texts_is_refused_before_the_run_or_reported_after_it(
    stopped, options, tmp_path, monkeypatch, capsys
):
    """Not an exception when all the training is done."""
    trained = _final_state(stopped)
    monkeypatch.setattr(train, "run_steps", lambda *_: LoopResult(trained, True, 1.0, 64, []))
    monkeypatch.setattr(train, "compile_train_step", lambda *_: None)
    code, errors = _in_process(options(tmp_path / "run", "--data.validation_share=0"), capsys)
    if code == 0:
        assert json.loads((tmp_path / "run/summary.json").read_text())["tokens"] == STEPS * 2 * 32
    else:
        assert code == 2 and "data.validation_share" in _error(errors) and not (tmp_path / "run").exists()
