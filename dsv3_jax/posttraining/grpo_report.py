"""The end of a GRPO run: held-out problems before and after, curves, a response to read, summary.json."""

import json
import shlex
import textwrap
from pathlib import Path
from typing import Any

from dsv3_jax.config import Config
from dsv3_jax.files import write_atomically
from dsv3_jax.posttraining.grpo_loop import GRPOResult, GRPOSurroundings, evaluated
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.plots import write_curves

PANELS = {
    "reward": {"reward": "reward", "reward_accuracy": "accuracy", "reward_format": "format"},
    "nats a token": {"entropy": "entropy", "kl": "KL to the reference"},
    "tokens": {"response_tokens": "mean response"},
    "share of groups or responses": {"mixed_groups": "mixed groups", "truncated": "truncated"},
    "share of tokens": {"clipped_high": "clipped up", "clipped_low": "clipped down", "mismatch": "|trainer - sampler|"},
}


def write_grpo_report(workdir: Path, config: Config, result: GRPOResult, around: GRPOSurroundings) -> None:
    """Write summary.json and grpo.png into the workdir, print the figures and a response."""
    held_out = evaluated(result.state, config, around, held_out=around.rollouts.task.held_out)
    first = next(entry for entry in read_metrics(workdir / "metrics.jsonl") if entry["step"] == 0)
    summary = {
        **held_out,
        **{f"{name}_before": value for name, value in first.items() if name.startswith("held_out")},
        "held_out_problems": len(around.rollouts.task.held_out),
        "group_size": config.grpo.group_size,
        "temperature": config.grpo.temperature,
        "updates": config.training.steps,
        "responses": config.training.steps * config.training.batch_size,
        "seconds": result.seconds or None,
    }
    group = config.grpo.group_size
    validation = {"greedy_pass_at_1": "greedy pass@1", "pass_at_1": "pass@1", f"pass_at_{group}": f"pass@{group}"}
    panels = {"validation": {f"validation_{name}": label for name, label in validation.items()}, **PANELS}
    write_curves(workdir / "metrics.jsonl", workdir / "grpo.png", panels)
    print_grpo_summary(workdir, summary)
    state, number = result.state, config.training.steps // config.grpo.updates_per_rollout
    shown = around.rollouts.training(state.parameters, state.router_bias, number)
    print("\na response to a problem that was not trained on:\n")
    print(textwrap.indent(shown.judged[0][0].response.text, "    "))
    prompt = around.rollouts.task.held_out[0].prompt
    print("\nnext:\n  " + shlex.join(["python", "infer.py", f"--checkpoint={workdir}", "--chat", f"--prompt={prompt}"]))
    # Last: a workdir with a summary has had its whole report.
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")


def repeat_grpo_report(workdir: Path) -> bool:
    """Print the figures of a run that has ended; False where there is no summary.json yet."""
    path = workdir / "summary.json"
    if path.exists():
        print_grpo_summary(workdir, json.loads(path.read_text(encoding="utf-8")))
        print(f"\nThis run has ended. Another --workdir starts a new one; --init={workdir} gives it these parameters.")
    return path.exists()


def print_grpo_summary(workdir: Path, summary: dict[str, Any]) -> None:
    group, problems = summary["group_size"], summary["held_out_problems"]
    figures = {"greedy": "greedy_pass_at_1", "pass@1": "pass_at_1", f"pass@{group}": f"pass_at_{group}"}
    moved = [
        f"{label} {summary[f'held_out_{name}_before']:.3f} -> {summary[f'held_out_{name}']:.3f}"
        for label, name in figures.items()
    ]
    seconds = f" in {summary['seconds']:.0f} s" if summary["seconds"] else ""
    print(
        f"\ntrained     {summary['updates']:,} updates on {summary['responses']:,} responses{seconds}"
        f"\nheld out    {', '.join(moved)}, of {problems} problems, {group} responses each at temperature "
        f"{summary['temperature']:g}"
        f"\nfiles       {workdir}: summary.json, metrics.jsonl, grpo.png, checkpoints, tensorboard"
    )
