"""The loop around the training step: data in, metrics out, checkpoints, validation, a clean stop."""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.data.pipeline import StreamedBatches
from dsv3_jax.errors import UserError
from dsv3_jax.model.functional import Skeleton
from dsv3_jax.processes import everyones_text, on_any_process
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.diagnosis import first_bad_tensor
from dsv3_jax.training.evaluation import Evaluation
from dsv3_jax.training.flops import model_flops_per_token
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.metrics import Metric, MetricsLog
from dsv3_jax.training.progress import Progress
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import StepMetrics, TrainStep
from sharding.mesh import place_rows


class NotFiniteError(UserError):
    """A step met a NaN or an infinity. The message names the step and the first bad tensor."""


class LoopResult(NamedTuple):
    state: TrainState
    finished: bool
    """False: a signal stopped the run before its last step; its checkpoint is saved."""
    seconds: float
    """Spent in steps, the first one and its compilation left out; validation and checkpoints left out too."""
    timed_tokens: int
    """Tokens trained in those seconds."""
    load_history: list[tuple[int, np.ndarray]]
    """(step, tokens sent to each expert [routers, E]) at each logged step."""


class Surroundings(NamedTuple):
    """What the loop talks to."""

    batches: StreamedBatches
    checkpoints: Checkpoints
    log: MetricsLog
    progress: Progress
    validate: Callable[[TrainState], Evaluation]
    interrupted: Callable[[], bool]
    matmul_rate: float
    """FLOP/s of all devices, the denominator of the utilisation."""
    rows: int
    """Of a batch."""
    mesh: Mesh

    def batch(self) -> Batch:
        """The next one, on its devices."""
        rows = {name: place_rows(blocks, self.rows, self.mesh) for name, blocks in next(self.batches).items()}
        return Batch(**rows)


def run_steps(
    state: TrainState, train_step: TrainStep, config: Config, skeleton: Skeleton, around: Surroundings
) -> LoopResult:
    """Train from the state's step to the config's last one, or until interrupted.

    Raises:
        NotFiniteError: nothing of the bad step is kept; the last checkpoint stays the last.
        CheckpointError: a save failed.
    """
    training, meter = config.training, Meter(config, around.matmul_rate)
    first, finished, load_history = int(state.step), True, []
    following = around.batch()
    for step in range(first + 1, training.steps + 1):
        batch, data_state = following, around.batches.get_state()
        state, metrics = train_step(state, batch)
        # The step runs in the background: the next batch is made meanwhile.
        following = around.batch()
        if not metrics.finite:
            raise NotFiniteError(
                f"step {step} is not finite: {first_bad_tensor(state, batch, config, skeleton, around.mesh)}; "
                "nothing of it was kept; a lower optimizer.learning_rate often helps"
            )
        meter.step_done()
        last, stop = step == training.steps, on_any_process(around.interrupted())
        if step % training.log_interval == 0 or last:
            values = meter.read(metrics)
            around.log.log(step, values)
            around.progress.show(step, values)
            load_history.append((step, stacked_loads(metrics)))
        if training.validation_interval and step % training.validation_interval == 0 and not last:
            with meter.paused():
                around.log.log(step, {"validation_loss": around.validate(state).loss})
        around.checkpoints.check()
        if step % config.checkpoint.interval == 0 or last or stop:
            with meter.paused():
                around.checkpoints.save(step, state, everyones_state(data_state))
        if stop and not last:
            finished = False
            break
    around.checkpoints.wait()
    return LoopResult(state, finished, meter.seconds, meter.tokens, load_history)


def everyones_state(data_state: dict[str, Any]) -> dict[str, Any]:
    """The data position of all processes' streams. All call this at the same step."""
    states = [json.loads(text) for text in everyones_text(json.dumps(data_state))]
    return {stream: state for of_process in states for stream, state in of_process.items()}


class Meter:
    """Speed since the last reading and over the run; time spent paused, and the first step, do not count."""

    def __init__(self, config: Config, matmul_rate: float):
        self._config, self._matmul_rate = config, matmul_rate
        self._tokens_a_step = config.training.batch_size * config.training.sequence_length
        self._flops_per_token = model_flops_per_token(config.model, config.training.sequence_length)
        self._since: float | None = None
        self._interval_seconds, self._interval_tokens = 0.0, 0
        self.seconds, self.tokens = 0.0, 0

    def step_done(self) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self._interval_seconds += now - self._since
            self._interval_tokens += self._tokens_a_step
        self._since = now

    def paused(self) -> "Meter":
        return self

    def __enter__(self) -> None:
        self._pause_began = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if self._since is not None:
            self._since += time.perf_counter() - self._pause_began

    def read(self, metrics: StepMetrics) -> dict[str, Metric]:
        """The metrics of a step and the speed since the last reading, as logged."""
        speed = self._interval_tokens / self._interval_seconds if self._interval_seconds else 0.0
        self.seconds += self._interval_seconds
        self.tokens += self._interval_tokens
        self._interval_seconds, self._interval_tokens = 0.0, 0
        load_LE = stacked_loads(metrics)
        mtp = np.asarray(metrics.losses.mtp)
        return {
            "loss": float(metrics.losses.next_token),
            **({"mtp_loss": float(mtp.mean())} if mtp.size else {}),
            "balance_loss": float(metrics.losses.balance),
            **({} if metrics.losses.teacher is None else {"teacher_loss": float(metrics.losses.teacher)}),
            "gradient_norm": float(metrics.gradient_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens_per_second": speed,
            "matmul_rate_share": speed * self._flops_per_token / self._matmul_rate,
            "max_violation": max_violation(load_LE).tolist(),
            "load_entropy": load_entropy(load_LE).tolist(),
            "dropped_tokens": int(metrics.dropped),
        }


def stacked_loads(metrics: StepMetrics) -> np.ndarray:
    """int [routers, E]: tokens sent to each expert, MoE blocks first, then MTP modules."""
    loads = [np.atleast_2d(jax.device_get(load)) for load in metrics.loads]
    return np.concatenate(loads) if loads else np.zeros((0, 0), np.int32)


def max_violation(load_LE: np.ndarray) -> np.ndarray:
    """MaxVio of each layer: largest load over mean load, minus 1; 0 is balance (ALF section 4)."""
    if load_LE.size == 0:
        return np.zeros(len(load_LE))
    return load_LE.max(axis=-1) / np.maximum(load_LE.mean(axis=-1), 1e-9) - 1


def load_entropy(load_LE: np.ndarray) -> np.ndarray:
    """Entropy of each layer's load as a share of its largest, log E: 1 is balance, 0 one expert."""
    if load_LE.size == 0 or load_LE.shape[-1] == 1:
        return np.ones(len(load_LE))
    share_LE = load_LE / np.maximum(load_LE.sum(axis=-1, keepdims=True), 1)
    logs_LE = np.log(share_LE, where=share_LE > 0, out=np.zeros_like(share_LE))
    return -(share_LE * logs_LE).sum(axis=-1) / np.log(load_LE.shape[-1])
