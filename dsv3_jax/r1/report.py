"""What a pipeline came to: a line a model."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.files import write_atomically


def rows(figures: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The figures of each model that a reader compares."""
    for stage, of in figures:
        sampled, most = of["sampled"], max(of["sampled"]["pass_at"], key=int)
        yield {
            "stage": stage,
            "greedy": of["greedy"]["pass_at"]["1"],
            "pass@1": sampled["pass_at"]["1"],
            f"pass@{most}": sampled["pass_at"][most],
            "format": sampled["rewards"].get("format", 0.0),
            "tokens": sampled["tokens"],
            "seconds": of["seconds"],
        }


def write_report(folder: Path, figures: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Write FOLDER/summary.json, and return the same as a table."""
    found = list(rows(figures))
    write_atomically(folder / "summary.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    names = list(found[0])
    lines = [f"{'stage':<16}" + "".join(f"{name:>9}" for name in names[1:])]
    for row in found:
        *shares, tokens, seconds = list(row.values())[1:]
        trained = "" if seconds is None else f"{seconds:.0f}"
        lines.append(
            f"{row['stage']:<16}" + "".join(f"{share:>9.3f}" for share in shares) + f"{tokens:>9.1f}{trained:>9}"
        )
    return "\n".join(lines)
