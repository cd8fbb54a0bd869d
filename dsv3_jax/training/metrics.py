"""metrics.jsonl and TensorBoard events of a run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.files import naming, write_atomically

Metric = float | int | Sequence[float]


class MetricsLog:
    """One JSON object a logged step in workdir/metrics.jsonl, the same numbers in workdir/tensorboard."""

    def __init__(self, workdir: Path, resume_step: int):
        """Forgets what a run that was killed logged after `resume_step`, the step of its checkpoint (0: a new run).

        The steps that follow are logged again, so the file of a resumed run is that of an uninterrupted one.
        """
        # Late, because it imports torch wherever torch is installed: seconds, of which nothing here needs any.
        from tensorboardX import SummaryWriter

        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [entry for entry in read_metrics(path) if entry["step"] <= resume_step] if resume_step else []
        write_atomically(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, values: Mapping[str, Metric]) -> None:
        """Append one line, handed to the operating system before this returns. NaN and infinities become null.

        A list, such as one value a layer, is one list in the line and one scalar an element in TensorBoard.
        """
        with naming(Path(self._file.name)):
            self._file.write(_line({"step": step, **values}))
            self._file.flush()
        for name, value in values.items():
            is_list = isinstance(value, Sequence)
            for index, element in enumerate(value if isinstance(value, Sequence) else [value]):
                tag = f"{name}/{index:02d}" if is_list else name
                if math.isfinite(element):  # tensorboardX complains of the others
                    self._events.add_scalar(tag, element, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


class NoLog(MetricsLog):
    """Of a process that leaves the writing to another."""

    def __init__(self) -> None:
        pass

    def log(self, step: int, values: Mapping[str, Metric]) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] where there is no file. A last line cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps({name: _finite(value) for name, value in entry.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    # JSON has no NaN: a strict reader would refuse the whole file at the step one most wants to see.
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
