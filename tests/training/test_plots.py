"""The pictures show what they are given; they are read back through the figure that is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dsv3_jax.training import plots
from dsv3_jax.training.plots import write_expert_load, write_loss_curve


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    figures: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, png: Path) -> None:
        figures.append(figure)
        save(figure, png)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def _is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_loss_curve(tmp_path, drawn):
    entries = [{"step": step, "loss": 8 / step, "mtp_loss": 9 / step} for step in range(1, 101)]
    entries[9]["loss"] = None
    entries.append({"step": 100, "validation_loss": 0.25})
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    write_loss_curve(metrics, tmp_path / "loss.png")
    lines = drawn[0].axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [100, 100, 99, 99, 1]
    assert _is_png(tmp_path / "loss.png") and not list(tmp_path.glob("*.tmp"))
    raw, smooth = np.asarray(lines[0].get_ydata()), np.asarray(lines[1].get_ydata())
    assert smooth[0] == raw[0] and smooth[50] == pytest.approx(raw[48:53].mean())
    assert smooth[-1] == pytest.approx(raw[-3:].mean())


def test_a_run_without_metrics_has_an_empty_curve(tmp_path, drawn):
    write_loss_curve(tmp_path / "none.jsonl", tmp_path / "loss.png")
    assert _is_png(tmp_path / "loss.png") and not drawn[0].axes[0].lines


def test_expert_load(tmp_path, drawn):
    uneven, even = np.array([[8, 0, 0, 0], [2, 2, 2, 2]]), np.array([[3, 1, 2, 2], [2, 2, 2, 2]])
    write_expert_load([(step, uneven if step < 7 else even) for step in range(1, 9)], tmp_path / "load.png")
    left, right = drawn[0].axes[:2]
    np.testing.assert_allclose(left.images[0].get_array(), [[1.5, 0.5, 1, 1], [1, 1, 1, 1]])
    first_layer, second_layer, mean = (line.get_ydata() for line in right.lines)
    np.testing.assert_allclose(first_layer, [3] * 6 + [0.5] * 2)
    np.testing.assert_allclose(second_layer, [0] * 8)
    np.testing.assert_allclose(mean, [1.5] * 6 + [0.25] * 2)
    assert _is_png(tmp_path / "load.png")
