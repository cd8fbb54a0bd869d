"""What a person sees while a run trains: a bar on a terminal, a plain line now and then in a log file."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from dsv3_jax.processes import is_first_process

PLAIN_INTERVAL = 15.0
"""Seconds between lines where stderr is not a terminal."""


def note(text: str) -> None:
    """One line on stderr, before there is a bar: what the program is busy with. One process speaks for all."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Steps done, loss, tokens a second and time left, on stderr."""

    def __init__(self, steps: int, resume_step: int, *, silent: bool = False):
        self._steps, self._start, self._silent = steps, resume_step, silent
        self._began, self._shown = time.monotonic(), -PLAIN_INTERVAL
        self._bar = tqdm(
            total=steps,
            initial=resume_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0,
            miniters=1,
            disable=silent or not sys.stderr.isatty(),
            bar_format="{n_fmt}/{total_fmt} {bar} {percentage:3.0f}%  {desc}{elapsed} < {remaining}",
        )

    def show(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call at each logged step; the last step is always shown."""
        self.show_text(step, f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s  ")

    def show_text(self, step: int, text: str) -> None:
        """The same of a run that has other things to tell."""
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and not self._silent:
            self._show_line(step, text)

    def message(self, text: str) -> None:
        """One line on stderr that leaves the bar whole."""
        if not self._silent:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def _show_line(self, step: int, text: str) -> None:
        now = time.monotonic()
        if now - self._shown < PLAIN_INTERVAL and step < self._steps:
            return
        self._shown = now
        elapsed = now - self._began
        left = elapsed / max(step - self._start, 1) * (self._steps - step)
        times = f"{tqdm.format_interval(elapsed)} < {tqdm.format_interval(left)}"
        print(f"step {step}/{self._steps}  {text}{times}", file=sys.stderr, flush=True)
