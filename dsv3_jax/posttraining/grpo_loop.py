"""The loop of GRPO: rollout, verdicts, updates, now and then an evaluation; metrics and checkpoints on the way.

A rollout and its updates are one piece: checkpoints, evaluations and the end of an interrupted run come between two of
them. A rollout follows from its number and the parameters, so that nothing but the state is to be saved of it.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.posttraining.grpo_state import GRPOState, with_fresh_reference
from dsv3_jax.posttraining.grpo_step import GRPOMetrics, GRPOStep, Scorer
from dsv3_jax.posttraining.learning import Learning, learning_of
from dsv3_jax.posttraining.rollout import Rollout, Rollouts
from dsv3_jax.tasks import Problem
from dsv3_jax.tasks.evaluation import figures
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.loop import NotFiniteError
from dsv3_jax.training.metrics import Metric, MetricsLog
from dsv3_jax.training.progress import Progress


class GRPOSurroundings(NamedTuple):
    """What the loop talks to."""

    rollouts: Rollouts
    score: Scorer
    checkpoints: Checkpoints
    log: MetricsLog
    progress: Progress
    interrupted: Callable[[], bool]
    shards: int
    """Parts that the mesh divides rows into."""


class GRPOResult(NamedTuple):
    state: GRPOState
    finished: bool
    """False: a signal stopped the run before its last step; its checkpoint is saved."""
    seconds: float
    """Spent in rollouts and updates."""


def run_grpo(state: GRPOState, step: GRPOStep, config: Config, around: GRPOSurroundings) -> GRPOResult:
    """Train from the state's step to the config's last one, or until interrupted.

    Raises:
        NotFiniteError: nothing of the bad update is kept; the last checkpoint stays the last.
        CheckpointError: a save failed.
        RewardError: a verifier gave a reward that it may not give.
    """
    updates, seconds, finished = config.grpo.updates_per_rollout, 0.0, True
    if int(state.step) == 0:
        around.log.log(
            0,
            evaluated(
                state,
                config,
                around,
                held_out=around.rollouts.task.held_out,
                validation=around.rollouts.task.validation,
            ),
        )
    for number in range(int(state.step) // updates, config.training.steps // updates):
        start = time.perf_counter()
        state, last = _learn_from_one(state, step, number, config, around)
        seconds += time.perf_counter() - start
        done, stop = int(state.step), around.interrupted()
        at_end = done == config.training.steps
        if _due(done, updates, config.training.validation_interval) and not at_end:
            last |= evaluated(state, config, around, validation=around.rollouts.task.validation)
        if _due(done, updates, config.training.log_interval) or "validation_pass_at_1" in last or at_end:
            around.log.log(done, last)
            around.progress.show_text(done, _in_brief(last))
        around.checkpoints.check()
        if _due(done, updates, config.checkpoint.interval) or at_end or stop:
            around.checkpoints.save(done, state, {"rollouts": number + 1})
        if stop and not at_end:
            finished = False
            break
    around.checkpoints.wait()
    return GRPOResult(state, finished, seconds)


def _learn_from_one(
    state: GRPOState, step: GRPOStep, number: int, config: Config, around: GRPOSurroundings
) -> tuple[GRPOState, dict[str, Metric]]:
    """A rollout and all its updates; what is told of them."""
    rollout = around.rollouts.training(state.parameters, state.router_bias, number)
    for reason, count in figures(rollout.judged).failed.items():
        around.progress.message(f"rollout {number}: {count} responses are left out: {reason}")
    start = time.perf_counter()
    learning = learning_of(rollout, number, state, around.score, config, around.shards)
    metrics: list[GRPOMetrics] = []
    for update in learning.updates:
        state, of_update = step(state, update.batch, update.used)
        if not of_update.finite:
            raise NotFiniteError(
                f"step {int(state.step) + 1} is not finite; nothing of it was kept; a lower optimizer.learning_rate "
                "often helps"
            )
        metrics.append(jax.device_get(of_update))
        done, interval = int(state.step), config.grpo.reference_interval
        if config.grpo.kl_weight and interval and done % interval == 0:
            state = with_fresh_reference(state)
    updating_seconds = time.perf_counter() - start
    told = of_rollout(rollout, learning) | of_updates(metrics)
    return state, told | {"updating_seconds": updating_seconds}


def evaluated(
    state: GRPOState, config: Config, around: GRPOSurroundings, **splits: Sequence[Problem]
) -> dict[str, Metric]:
    """Greedy pass@1 of each split, and pass@1, pass@2, pass@4 ... at the temperature of the rollouts."""
    values: dict[str, Metric] = {}
    for name, problems in splits.items():
        # A greedy group says the same group_size times: a program of single rows would take longer to compile.
        greedy, sampled = (
            around.rollouts.evaluation(state.parameters, state.router_bias, problems, temperature).pass_at
            for temperature in (0.0, config.grpo.temperature)
        )
        values[f"{name}_greedy_pass_at_1"] = greedy[1]
        values |= {f"{name}_pass_at_{k}": share for k, share in sampled.items()}
    return values


def of_rollout(rollout: Rollout, learning: Learning) -> dict[str, Metric]:
    """What a rollout was: docs/grpo.md says what each number means."""
    found, judged_PG, rewards_PG = figures(rollout.judged), rollout.judged_PG, learning.rewards_PG
    mixed_P = learning.advantages.mixed_P
    lengths = [len(one.response.token_ids) for group in rollout.judged for one in group]

    def mean(values_PG: np.ndarray) -> float:
        return float(values_PG[judged_PG].mean()) if judged_PG.any() else 0.0

    return {
        "reward": mean(rewards_PG),
        **{f"reward_{name}": mean(rollout.column(name)) for name in rollout.rewards[0][0].parts},
        **{f"pass_at_{k}": share for k, share in found.pass_at.items()},
        "mixed_groups": float(mixed_P.mean()),
        "zero_variance_groups": int((~mixed_P).sum()),
        "verifier_failures": sum(found.failed.values()),
        "response_tokens": found.tokens,
        "response_tokens_max": max(lengths),
        "truncated": 1 - found.ended,
        "sampling_seconds": rollout.sampling_seconds,
        "verifying_seconds": rollout.verifying_seconds,
    }


def of_updates(metrics: Sequence[GRPOMetrics]) -> dict[str, Metric]:
    """The updates on one rollout: over all their tokens, or the mean over the updates."""
    tokens = max(sum(float(one.sums.tokens) for one in metrics), 1.0)

    def per_token(name: str) -> float:
        return sum(float(getattr(one.sums, name)) for one in metrics) / tokens

    mtp_loss = np.mean([np.mean(one.mtp_loss) for one in metrics]) if metrics[0].mtp_loss.size else None
    return {
        "loss": float(np.mean([one.sums.loss for one in metrics])),
        **({} if mtp_loss is None else {"mtp_loss": float(mtp_loss)}),
        **{name: per_token(name) for name in ("entropy", "kl", "ratio", "clipped_low", "clipped_high")},
        **{name: per_token(name) for name in ("mismatch", "mismatch_kl", "importance_capped")},
        "gradient_norm": float(np.mean([one.gradient_norm for one in metrics])),
        "learning_rate": float(metrics[-1].learning_rate),
    }


def _due(done: int, updates: int, interval: int) -> bool:
    """Whether a multiple of the interval was passed by the last updates; never where it is 0."""
    return interval > 0 and done // interval > (done - updates) // interval


def _in_brief(values: dict[str, Metric]) -> str:
    return (
        f"reward {values['reward']:.3f}  pass@1 {values['pass_at_1']:.3f}  mixed {values['mixed_groups']:.0%}  "
        f"{values['response_tokens']:.0f} tokens  entropy {values['entropy']:.3f}  "
    )
