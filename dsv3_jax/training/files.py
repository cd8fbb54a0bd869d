"""Files of a workdir that are never half-written."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name, then rename: a reader or a crash sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_summary(workdir: Path, values: dict[str, Any]) -> None:
    """workdir/summary.json: the figures of a finished run, in the order given."""
    write_atomically(workdir / "summary.json", json.dumps(values, indent=2, allow_nan=False) + "\n")
