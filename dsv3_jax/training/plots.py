"""Pictures of a run: the loss curve, and how evenly the experts were used."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv3_jax.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 0.05
"""Share of the curve's points that the moving average spans."""
FINAL_WINDOW = 0.25
"""Share of the load history, from its end, that the heat map sums."""


def write_loss_curve(metrics_path: Path, png: Path) -> None:
    """The losses in a metrics.jsonl over steps: `loss`, `mtp_loss` and `validation_loss`, those that are there."""
    entries = read_metrics(metrics_path)
    figure = _figure(8, 4.5)
    axes = figure.add_subplot()
    for name, label, colour in (("mtp_loss", "MTP, one token further", "#d95f02"), ("loss", "next token", "#1b6ca8")):
        steps, values = _series(entries, name)
        if len(steps):
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=colour, linewidth=2, label=f"training, {label}")
    steps, values = _series(entries, "validation_loss")
    if len(steps):
        axes.plot(steps, values, "o", color="#1b1b1b", markersize=5, label="validation, next token")
        axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), (-4, 8), textcoords="offset points", ha="right")
    _label(axes, "step", "cross-entropy, nats a token")
    if axes.has_data():
        axes.legend(frameon=False)
    _save(figure, png)


def write_expert_load(load_history: Sequence[tuple[int, np.ndarray]], png: Path) -> None:
    """Load of every expert at the end of a run, and the worst overload over its length.

    Args:
        load_history: (step, load_LE) at some steps in order: tokens sent to each expert of each MoE layer.
        png: file to write. MaxVio of a layer is its largest load over its mean load, minus 1 (0 is balance).
    """
    steps = np.array([step for step, _ in load_history])
    load_TLE = np.stack([np.asarray(load_LE, np.float64) for _, load_LE in load_history])
    final_LE = load_TLE[-max(1, round(FINAL_WINDOW * len(steps))) :].sum(axis=0)
    relative_LE = final_LE / final_LE.mean(axis=1, keepdims=True)
    violation_TL = load_TLE.max(axis=2) / load_TLE.mean(axis=2) - 1

    figure = _figure(11, 4.5)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    image = left.imshow(relative_LE, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    figure.colorbar(image, ax=left, label="load relative to the layer's mean", extend="max")
    overload = (relative_LE.max(axis=1) - 1).mean()
    left.set_title(f"expert load, last {FINAL_WINDOW:.0%} of the run: MaxVio {overload:.2f}")
    left.set(xlabel="expert", ylabel="MoE layer")
    left.yaxis.get_major_locator().set_params(integer=True)
    left.xaxis.get_major_locator().set_params(integer=True)

    for violation_T in violation_TL.T:
        right.plot(steps, violation_T, color="#1b6ca8", alpha=min(0.3, 2 / violation_TL.shape[1]), linewidth=0.8)
    right.plot(steps, violation_TL.mean(axis=1), color="#1b6ca8", linewidth=2, label="mean of the layers")
    right.set_ylim(bottom=0)
    right.set_title("largest overload, batch by batch")
    _label(right, "step", "MaxVio (0: perfect balance)")
    right.legend(frameon=False)
    _save(figure, png)


def write_curves(metrics_path: Path, png: Path, panels: Mapping[str, Mapping[str, str]]) -> None:
    """Numbers of a metrics.jsonl over steps, a panel beside the other.

    `panels`: what the vertical axis of each shows, and its curves, from names in the file to labels. Those that are not
    there are left out.
    """
    entries = read_metrics(metrics_path)
    columns = -(-len(panels) // 2)
    figure = _figure(4.5 * columns, 7)
    for axes, (title, curves) in zip(figure.subplots(2, columns).flat, panels.items(), strict=False):
        for name, label in curves.items():
            steps, values = _series(entries, name)
            if len(steps):
                (line,) = axes.plot(steps, values, alpha=0.3, linewidth=0.8)
                axes.plot(steps, _smooth(values), color=line.get_color(), linewidth=2, label=label)
        _label(axes, "step", title)
        if axes.has_data():
            axes.legend(frameon=False)
    _save(figure, png)


def _series(entries: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the entries that have a finite `name`."""
    points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
    return np.array([step for step, _ in points]), np.array([value for _, value in points])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average. Its span shrinks at the steep beginning and is cut off at the flat end."""
    half = round(SMOOTHING * len(values) / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, index)
    first, last = index - reach, np.minimum(index + reach, len(values) - 1)
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _figure(width: float, height: float) -> "Figure":
    # A bare Figure draws with Agg: no display, no global pyplot state.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _label(axes: "Axes", x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", png: Path) -> None:
    temporary = png.with_name(png.name + ".tmp")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(png)
