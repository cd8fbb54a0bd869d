"""Whether a model learns in FP8 what it learns in BF16: the same seed and data, loss beside loss (V3 appendix B).

python -m benchmarks.float8_loss [--folder=runs/float8_loss] [--seeds=0,1,2] [--variants=bf16,fp8] [--OPTION=VALUE ...]

Trains `--config=tiny` once for each variant and seed, with any further options of train.py, and compares. A run that is
done is not made again and one that was stopped goes on, so seeds and variants can be added one after the other; what is
there of all variants is compared. As in the paper losses are smoothed, by an exponential moving average of 0.9, and the
difference is relative: its mean over the second half of the steps, and its largest magnitude there. What any rounding
does to a run as short as this one is shown by float32, and by bf16-halves: the same gradient, summed over two halves of
a batch.

Writes FOLDER/float8_loss.csv, a line a variant and seed, and FOLDER/float8_loss.png.
"""

import csv
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.options import own_and_other_options
from dsv3_jax.command_line import run_main
from dsv3_jax.errors import ArgumentError
from dsv3_jax.training.metrics import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASELINE = "bf16"
VARIANTS = {
    BASELINE: ["--model.precision=bfloat16"],
    "bf16-halves": ["--model.precision=bfloat16", "--training.microbatches=2"],
    "float32": ["--model.precision=float32"],
    "fp8": ["--model.precision=fp8"],
    "fp8-power-of-two": ["--model.precision=fp8", "--model.float8_scales=power_of_two"],
    "fp8-tensor": ["--model.precision=fp8", "--model.float8_tiles=tensor"],
    "fp8-gradient-blocks": ["--model.precision=fp8", "--model.float8_tiles=gradient_blocks"],
}
# The recipe's moments and what it recomputes, so that nothing but FP8 differs.
ALIKE = ["--config=tiny", "--training.log_interval=1", "--optimizer.moments=bfloat16", "--model.remat=up_projections"]
SMOOTHING = 0.9


def main() -> None:
    given, options = own_and_other_options(
        sys.argv[1:], {"folder": "runs/float8_loss", "seeds": "0,1,2", "variants": "bf16,fp8"}
    )
    folder = Path(given["folder"])
    for name in given["variants"].split(","):
        if name not in VARIANTS:
            raise ArgumentError(f"--variants={name} is none of {', '.join(VARIANTS)}")
    for seed in map(int, given["seeds"].split(",")):
        for name in given["variants"].split(","):
            train(folder, name, seed, options)
    compare(folder)


def train(folder: Path, name: str, seed: int, options: list[str]) -> None:
    workdir = workdir_of(folder, name, seed)
    if (workdir / "summary.json").exists():
        return
    print(f"training {workdir}", flush=True)
    command = [*ALIKE, *VARIANTS[name], *options, f"--seed={seed}", f"--workdir={workdir}"]
    subprocess.run([sys.executable, "train.py", *command], check=True, stdout=subprocess.DEVNULL)


def workdir_of(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-seed{seed}"


def compare(folder: Path) -> None:
    """Of every finished run that has a finished baseline of its seed."""
    found = []
    for name in VARIANTS:
        for summary in sorted(folder.glob(f"{name}-seed*/summary.json")):
            seed = int(summary.parent.name.removeprefix(f"{name}-seed"))
            baseline = workdir_of(folder, BASELINE, seed)
            if name != BASELINE and (baseline / "summary.json").exists():
                found.append((name, seed, relative_difference(losses(summary.parent), losses(baseline))))
    if not found:
        print("no run to compare with its baseline yet")
        return
    with open(folder / "float8_loss.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", "steps", "mean_relative_difference", "largest_relative_difference"])
        print(f"{'variant':<20} {'seed':>4} {'mean':>9} {'largest':>9}   over the second half of the steps")
        for name, seed, difference in found:
            half = difference[len(difference) // 2 :]
            mean, largest = half.mean(), np.abs(half).max()
            writer.writerow([name, seed, len(difference), mean, largest])
            print(f"{name:<20} {seed:>4} {mean:>+9.3%} {largest:>9.3%}")
    plot(found, folder / "float8_loss.png")


def losses(workdir: Path) -> np.ndarray:
    entries = read_metrics(workdir / "metrics.jsonl")
    return np.array([entry["loss"] for entry in entries if "loss" in entry])


def smoothed(values: np.ndarray) -> np.ndarray:
    """The moving average, begun at the first value."""
    average, found = values[0], []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        found.append(average)
    return np.array(found)


def relative_difference(of_variant: np.ndarray, of_baseline: np.ndarray) -> np.ndarray:
    baseline = smoothed(of_baseline)
    return (smoothed(of_variant) - baseline) / baseline


def plot(found: list[tuple[str, int, np.ndarray]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colors = dict(zip(VARIANTS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for name, seed, difference in found:
        axes.plot(100 * difference, color=colors[name], label=f"{name}, seed {seed}", linewidth=1)
    axes.axhspan(-0.25, 0.25, color="gray", alpha=0.2, label="0.25 %")
    axes.set(xlabel="step", ylabel="loss relative to BF16, %")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_main(main)
