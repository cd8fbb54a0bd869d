"""What a task with verifiable answers is: problems to be answered in R1's form, and verdicts on the answers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dsv3_jax.errors import UserError

ACCURACY, FORMAT = "accuracy", "format"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
RESPONSE = re.compile(r"\s*<think>(?P<thinking>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)


class TaskError(UserError, ValueError):
    """Problems that cannot be made or read. The message names the field or file, what is wrong and what would be
    right."""


@dataclass(frozen=True)
class Verdict:
    """What a response is worth."""

    rewards: Mapping[str, float]
    """Named parts, each from 0 to 1, among them at least accuracy and format."""
    failed: str | None = None
    """Why the verifier came to no verdict (it raised, died or took too long); the rewards are then 0 and mean
    nothing. None: they are what the response is worth."""

    @property
    def correct(self) -> bool:
        return self.rewards[ACCURACY] == 1.0


class Problem(Protocol):
    """One question with an answer that a program can check."""

    @property
    def prompt(self) -> str:
        """What the user says."""

    def verify(self, response: str) -> Verdict:
        """The verdict on what the assistant said, its tags included and its end token not. It never raises for
        anything that a response may hold, and may be called from any thread."""


@runtime_checkable
class DemonstratedProblem(Problem, Protocol):
    """A problem that comes with a worked solution."""

    def demonstration(self) -> str:
        """A response in R1's form that `verify` finds correct; always the same one."""


class Task(Protocol):
    """Problems of one kind. The three splits have no problem in common, not even with its operands in another order."""

    def problem(self, index: int) -> Problem:
        """Training problem `index`, 0, 1, ..., the same at every call; there is no last one."""

    @property
    def validation(self) -> Sequence[Problem]:
        """For choices made while developing."""

    @property
    def held_out(self) -> Sequence[Problem]:
        """For the figures that are reported."""


def parts_of(response: str) -> tuple[str, str]:
    """Thinking and answer of a response in R1's form, <think>...</think><answer>...</answer>. Raises ValueError for any
    other.

    Each tag stands there once, and nothing but whitespace around the two parts (R1 table 1).
    """
    match = RESPONSE.fullmatch(response) if all(response.count(tag) == 1 for tag in TAGS) else None
    if match is None:
        raise ValueError("not in R1's form")
    return match["thinking"], match["answer"].strip()


def answer_in(response: str) -> str | None:
    """The answer of a response in R1's form; None of any other."""
    try:
        return parts_of(response)[1]
    except ValueError:
        return None


def thinking_in(response: str) -> str:
    """The thinking of a response in R1's form; none of any other."""
    try:
        return parts_of(response)[0].strip()
    except ValueError:
        return ""


def in_response_form(thinking: str, answer: str) -> str:
    """The response that `parts_of` takes apart."""
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def verdict_on(formatted: bool, accuracy: float, failed: str | None = None) -> Verdict:
    """A verdict with the two parts of R1's rule-based reward (R1 section 2.2).

    No accuracy without the format: a sum in which either counts alone pays for right answers in any form, and for the
    form around no answer at all.
    """
    if failed is not None:
        return Verdict({ACCURACY: 0.0, FORMAT: 0.0}, failed)
    return Verdict({ACCURACY: accuracy if formatted else 0.0, FORMAT: float(formatted)})
