"""The loop: when it logs, validates, saves and stops, and what its numbers mean."""

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import config as tiny
from dsv3_jax.config import CheckpointConfig, Config
from dsv3_jax.training import loop
from dsv3_jax.training.checkpoint import CheckpointError
from dsv3_jax.training.evaluation import Evaluation
from dsv3_jax.training.flops import model_flops_per_token
from dsv3_jax.training.loop import (
    LoopResult,
    Meter,
    NotFiniteError,
    Surroundings,
    load_entropy,
    max_violation,
    run_steps,
    stacked_loads,
)
from dsv3_jax.training.losses import Losses
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import StepMetrics
from sharding.mesh import one_device


def _metrics(finite: bool = True, **changes: Any) -> StepMetrics:
    losses = Losses(jnp.float32(2.5), jnp.array([3.0, 5.0]), jnp.float32(1.1))
    loads = [jnp.array([[4, 0], [2, 2]], jnp.int32), jnp.array([1, 3], jnp.int32)]
    made = StepMetrics(losses, jnp.float32(0.7), jnp.float32(1e-3), loads, jnp.int32(0), jnp.bool_(finite))
    return made._replace(**changes)


# Numbers.


def test_max_violation_is_the_largest_load_over_the_mean_less_one():
    load_LE = np.array([[4, 4, 4, 4], [16, 0, 0, 0], [6, 2, 5, 3], [0, 0, 0, 0]])
    np.testing.assert_allclose(max_violation(load_LE), [0, 3, 0.5, -1])


def test_load_entropy_is_a_share_of_the_entropy_of_balance():
    load_LE = np.array([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(load_entropy(load_LE), [1, 0, 0.5, 0], atol=1e-12)
    share = np.array([6, 2, 5, 3]) / 16
    expected = -(share * np.log2(share)).sum() / 2
    np.testing.assert_allclose(load_entropy(np.array([[6, 2, 5, 3]])), [expected])


def test_one_expert_or_none_is_balanced():
    np.testing.assert_array_equal(load_entropy(np.array([[7], [0]])), [1, 1])
    assert load_entropy(np.zeros((0, 0), np.int32)).shape == (0,)


def test_loads_of_blocks_and_modules_are_stacked_in_order():
    np.testing.assert_array_equal(stacked_loads(_metrics()), [[4, 0], [2, 2], [1, 3]])
    assert stacked_loads(_metrics(loads=[])).shape == (0, 0)


# Speed.


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now.seconds)
    return now


def test_the_meter_leaves_out_the_first_step_and_every_pause(clock):
    meter, tokens = Meter(tiny, matmul_rate=1e12), 8 * 256
    for seconds in (60.0, 2.0, 3.0):  # the first compiles
        clock.seconds += seconds
        meter.step_done()
    with meter.paused():
        clock.seconds += 500
    clock.seconds += 1
    meter.step_done()
    read = meter.read(_metrics())
    assert read["tokens_per_second"] == pytest.approx(3 * tokens / 6)
    expected = read["tokens_per_second"] * model_flops_per_token(tiny.model, 256) / 1e12
    assert read["matmul_rate_share"] == pytest.approx(expected)
    clock.seconds += 4
    meter.step_done()
    assert meter.read(_metrics())["tokens_per_second"] == pytest.approx(tokens / 4)
    assert (meter.seconds, meter.tokens) == (pytest.approx(10), 4 * tokens)


def test_a_reading_before_any_timed_step_has_no_speed(clock):
    meter = Meter(tiny, matmul_rate=1e12)
    with meter.paused():
        clock.seconds += 5
    meter.step_done()
    read = meter.read(_metrics())
    assert (read["tokens_per_second"], read["matmul_rate_share"], meter.seconds) == (0, 0, 0)


def test_a_reading_holds_every_figure_as_plain_numbers():
    read = Meter(tiny, matmul_rate=1e12).read(_metrics())
    assert (read["loss"], read["mtp_loss"]) == (2.5, 4.0)
    assert read["balance_loss"] == pytest.approx(1.1) and read["gradient_norm"] == pytest.approx(0.7)
    assert read["learning_rate"] == pytest.approx(1e-3) and read["dropped_tokens"] == 0
    assert read["max_violation"] == [1, 0, 0.5]
    assert read["load_entropy"] == pytest.approx([0, 1, 0.811278], abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_a_model_without_experts_or_modules_has_empty_lists_and_no_mtp_loss():
    losses = Losses(jnp.float32(2.5), jnp.zeros(0), jnp.float32(0))
    read = Meter(tiny, matmul_rate=1e12).read(_metrics(losses=losses, loads=[]))
    assert "mtp_loss" not in read and (read["max_violation"], read["load_entropy"]) == ([], [])


# The loop, around a step that only counts.


class Recorder:
    """Checkpoints, log and progress in one: remembers what it was told."""

    def __init__(self):
        self.saved: list[tuple[int, int, int]] = []
        self.logged: list[tuple[int, str]] = []
        self.waited = False
        self.failing_after = 10**9

    def save(self, step: int, state: TrainState, data_state: dict) -> None:
        self.saved.append((step, int(state.step), data_state["taken"]))

    def check(self) -> None:
        if self.saved and self.saved[-1][0] >= self.failing_after:
            raise CheckpointError("the disk is full")

    def wait(self) -> None:
        self.waited = True

    def log(self, step: int, values: dict) -> None:
        self.logged.append((step, "validation" if "validation_loss" in values else "training"))

    def show(self, step: int, *_: Any) -> None:
        assert (step, "training") == self.logged[-1]


class Batches:
    """Batches 1, 2, ... and grain's get_state: how many were taken."""

    def __init__(self, taken: int):
        self.taken = taken

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        self.taken += 1
        return {"tokens": self.taken, "segment_ids": None, "positions": None}

    def get_state(self) -> dict:
        return {"taken": self.taken}


def _config(steps: int = 10, **training: int) -> Config:
    lengths = {"tokens": steps * 8, "sequence_length": 8, "batch_size": 1, "log_interval": 4, **training}
    return dataclasses.replace(
        tiny,
        training=dataclasses.replace(tiny.training, **lengths),
        checkpoint=CheckpointConfig(interval=3),
    )


@pytest.fixture
def run(monkeypatch) -> Callable[..., LoopResult]:
    def run(
        config: Config, recorder: Recorder, first: int = 0, stop_after: int = 99, bad: int | None = None
    ) -> LoopResult:
        done = SimpleNamespace(step=first)

        def train_step(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
            assert batch.tokens == int(state.step) + 1, "every step has its own batch"
            done.step = batch.tokens
            finite = batch.tokens != bad
            return state._replace(step=state.step + finite), _metrics(finite)

        monkeypatch.setattr(loop, "place_rows", lambda blocks, *_: blocks)
        monkeypatch.setattr(loop, "first_bad_tensor", lambda *_: "the head has a NaN")
        state = TrainState(np.int32(first), {}, {}, None)
        around = Surroundings(
            Batches(first),
            recorder,
            recorder,
            recorder,
            lambda _: Evaluation(1.0, 1),
            lambda: done.step >= stop_after,
            1e12,
            1,
            one_device(),
        )
        return run_steps(state, train_step, config, None, around)

    return run


def test_intervals_and_the_last_step(run):
    recorder = Recorder()
    result = run(_config(validation_interval=5), recorder)
    assert recorder.logged == [(4, "training"), (5, "validation"), (8, "training"), (10, "training")]
    assert recorder.saved == [(step, step, step) for step in (3, 6, 9, 10)]
    assert result.finished and int(result.state.step) == 10 and recorder.waited
    assert [step for step, _ in result.load_history] == [4, 8, 10]


def test_a_checkpoint_holds_the_position_after_its_own_batch_and_not_the_one_read_ahead(run):
    recorder = Recorder()
    run(_config(), recorder)
    assert all(step == taken for step, _, taken in recorder.saved)


def test_a_run_goes_on_from_the_step_of_its_state(run):
    recorder = Recorder()
    assert run(_config(), recorder, first=6).finished
    assert recorder.logged == [(8, "training"), (10, "training")]
    assert recorder.saved == [(9, 9, 9), (10, 10, 10)]


def test_a_finished_run_takes_no_step(run):
    recorder = Recorder()
    result = run(_config(), recorder, first=10)
    assert result.finished and (recorder.logged, recorder.saved) == ([], [])
    assert (result.seconds, result.timed_tokens, result.load_history) == (0, 0, [])


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_signal_saves_and_stops_after_the_step_it_finds(run, stop):
    recorder = Recorder()
    result = run(_config(), recorder, stop_after=stop)
    assert not result.finished and recorder.waited
    assert recorder.saved[-1] == (stop, stop, stop) and int(result.state.step) == stop
    assert len(set(recorder.saved)) == len(recorder.saved)


def test_a_signal_in_the_last_step_changes_nothing(run):
    recorder = Recorder()
    assert run(_config(), recorder, stop_after=10).finished
    assert recorder.saved[-1] == (10, 10, 10)


@pytest.mark.parametrize("bad", [1, 6, 10])
def test_a_step_that_is_not_finite_ends_the_run_unsaved_and_unlogged(run, bad):
    recorder = Recorder()
    with pytest.raises(NotFiniteError, match=f"^step {bad} is not finite: the head has a NaN; ") as caught:
        run(_config(log_interval=1), recorder, bad=bad)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert [step for step, _ in recorder.logged] == list(range(1, bad))
    assert all(step < bad for step, _, _ in recorder.saved)


def test_a_save_that_failed_ends_the_run_at_the_next_step(run):
    recorder = Recorder()
    recorder.failing_after = 3
    with pytest.raises(CheckpointError, match="the disk is full"):
        run(_config(log_interval=1), recorder)
    assert recorder.logged[-1] == (4, "training")
