"""Sides measured in turns, so that a machine that slows down slows all of them.

Every other round goes through them backwards: what a side leaves behind (memory, caches, a busy disk) then meets each
of the others as often.
"""

import statistics
from collections.abc import Callable, Mapping


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One call of every side a round; each returns its figure."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in list(sides) if index % 2 == 0 else reversed(list(sides)):
            found[name].append(sides[name]())
    return found


def ratio(numerators: list[float], denominators: list[float]) -> str:
    """'1.52 (1.43 to 1.60)': median and range of the rounds' ratios."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
