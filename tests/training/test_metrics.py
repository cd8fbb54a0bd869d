"""Metrics, progress and summary files: strict JSON, nothing twice after a resume."""

import json
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from dsv3_jax.training import progress
from dsv3_jax.training.metrics import MetricsLog, read_metrics
from dsv3_jax.training.progress import Progress


def _log(workdir: Path, resume_step: int, steps: range) -> None:
    log = MetricsLog(workdir, resume_step)
    for step in steps:
        log.log(step, {"loss": 8.0 / step, "tokens": 256 * step, "max_violation": [0.25, 0.5 * step]})
    log.close()


def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path):
    _log(tmp_path / "straight", 0, range(10, 100, 10))
    _log(tmp_path / "killed", 0, range(10, 80, 10))
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 80, "lo')
    _log(tmp_path / "killed", 45, range(50, 100, 10))
    assert (tmp_path / "killed/metrics.jsonl").read_text() == (tmp_path / "straight/metrics.jsonl").read_text()
    assert len(read_metrics(tmp_path / "killed/metrics.jsonl")) == 9


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    _log(tmp_path, 0, range(1, 5))
    _log(tmp_path, 0, range(1, 3))
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_lines_are_strict_json_and_readable_at_once(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.log(3, {"loss": float("nan"), "norm": float("inf"), "load": [1.0, float("-inf")], "count": 2})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 3, "loss": None, "norm": None, "load": [1.0, None], "count": 2,
    }  # fmt: skip
    log.close()


def _scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every scalar in a folder's event files; a record is length, checksum, data, checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard_gets_one_scalar_a_layer_and_no_nan(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.log(7, {"loss": 0.5, "max_violation": [0.25, 0.75], "norm": float("nan")})
    log.close()
    assert sorted(_scalars(tmp_path / "tensorboard")) == [
        ("loss", 7, 0.5), ("max_violation/00", 7, 0.25), ("max_violation/01", 7, 0.75),
    ]  # fmt: skip


def test_a_log_file_gets_plain_lines_now_and_then_and_the_last(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 3600.0)
    shown = Progress(40, 10)
    for step in (20, 30, 40):
        shown.show(step, {"loss": 80.0 / step, "tokens_per_second": 1234.5})
    shown.message("validation 1.5")
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["step 20/40", "step 40/40", "validation 1.5"]
    assert "loss 2.0000  1,234 tokens/s" in lines[1] and "\r" not in "".join(lines)
