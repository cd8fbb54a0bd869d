"""The R1 pipeline from several seeds: what each stage comes to, what R1-Zero learns first, whether students gain.

python -m benchmarks.r1 [--folder=runs/r1] [--seeds=0,1,2] [--OPTION=VALUE ...]

Runs `python -m dsv3_jax.r1` for each seed, with any further options, and compares what is finished; running it again
goes on where it stopped. Prints a table of all stages, means and ranges over the seeds, and the update at which format
and accuracy of R1-Zero's rollouts have come half of their way; writes FOLDER/r1_zero.png and FOLDER/r1_stages.png.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.options import own_and_other_options
from dsv3_jax.command_line import run_main
from dsv3_jax.training.metrics import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURES = ("greedy", "pass@1", "pass@8", "format", "tokens", "seconds")
PANELS = (
    ("held out for validation", {"validation_greedy_pass_at_1": "greedy pass@1", "validation_pass_at_8": "pass@8"}),
    ("mean reward of the rollout", {"reward_format": "format", "reward_accuracy": "accuracy"}),
    ("entropy, nats a token", {"entropy": "entropy"}),
    ("tokens a response", {"response_tokens": "tokens"}),
)
COLORS = ("#1b6ca8", "#d95f02")


def main() -> None:
    given, options = own_and_other_options(sys.argv[1:], {"folder": "runs/r1", "seeds": "0,1,2"})
    folder, seeds = Path(given["folder"]), [int(seed) for seed in given["seeds"].split(",")]
    for seed in seeds:
        command = [sys.executable, "-m", "dsv3_jax.r1", f"--folder={folder / f'seed{seed}'}", f"--seed={seed}"]
        subprocess.run([*command, *options], check=True)
    summaries = [json.loads((folder / f"seed{seed}" / "summary.json").read_text()) for seed in seeds]
    print(table(summaries))
    curves = [read_metrics(folder / f"seed{seed}" / "zero" / "metrics.jsonl") for seed in seeds]
    for seed, entries in zip(seeds, curves, strict=True):
        ways = {name: half_way(*series(entries, f"reward_{name}")) for name in ("format", "accuracy")}
        entropy = series(entries, "entropy")[1]
        print(
            f"seed {seed}: half of the way after {ways['format']} updates (format) and {ways['accuracy']} (accuracy); "
            f"entropy {entropy[0]:.3f} -> {entropy[-1]:.3f}"
        )
    plot_zero(curves, seeds, folder / "r1_zero.png")
    plot_stages(summaries, folder / "r1_stages.png")


def table(summaries: list[list[dict[str, Any]]]) -> str:
    """A line a stage: the mean of each figure over the seeds, and its smallest and largest."""
    lines = [f"{'stage':<16}" + "".join(f"{name:>24}" for name in FIGURES)]
    for rows in zip(*summaries, strict=True):
        line = f"{rows[0]['stage']:<16}"
        for name in FIGURES:
            values = [row[name] for row in rows]
            digits = 0 if name == "seconds" else 1 if name == "tokens" else 3
            line += f"{f'{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})':>24}"
        lines.append(line)
    return "\n".join(lines)


def series(entries: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, where it was logged."""
    found = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])


def half_way(steps: np.ndarray, values: np.ndarray) -> int:
    """The first step whose value is as close to the mean of the last five as to the first."""
    return int(steps[np.argmax(values >= (values[0] + values[-5:].mean()) / 2)])


def plot_zero(curves: list[list[dict[str, Any]]], seeds: list[int], path: Path) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.4), layout="constrained")
    for panel, (title, names) in zip(axes, PANELS, strict=True):
        for color, (name, label) in zip(COLORS, names.items(), strict=False):
            for index, entries in enumerate(curves):
                panel.plot(*series(entries, name), color=color, linewidth=1.2, label=label if index == 0 else None)
        panel.set(title=title, xlabel="update")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
    figure.suptitle(f"R1-Zero from seeds {', '.join(map(str, seeds))}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_stages(summaries: list[list[dict[str, Any]]], path: Path) -> None:
    stages = [row["stage"] for row in summaries[0]]
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for shift, name, color in ((-0.12, "greedy", COLORS[0]), (0.12, "pass@1", COLORS[1])):
        for index, summary in enumerate(summaries):
            values = [row[name] for row in summary]
            label = name if index == 0 else None
            axes.plot(np.arange(len(stages)) + shift, values, "o", color=color, alpha=0.7, label=label)
    axes.set_xticks(range(len(stages)), [stage.replace("student_", "student\n") for stage in stages], fontsize="small")
    axes.set(ylabel="held-out problems", ylim=(0, 1.02))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_main(main)
