"""The section `task` of a configuration (config.py)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TaskConfig:
    """Problems with verifiable answers (dsv3_jax/tasks/): for evaluation, for demonstrations, for rewards."""

    kind: Literal["countdown", "arithmetic", "json_lines", "gym"] = "countdown"
    """countdown: make a target of all the numbers. arithmetic: sums, differences, products of two numbers. json_lines:
    problems and answers from a file. gym: a generator of the library reasoning-gym, if it is installed."""
    seed: int = 0
    """Seed of the training problems. Validation and held-out problems are the same at every seed."""
    validation_problems: int = 100
    """Problems set apart for choices made while developing; of a file, at most."""
    held_out_problems: int = 200
    """Problems set apart for the figures that are reported; of a file, at most."""
    countdown_numbers: int = 3
    """Numbers of a problem."""
    countdown_largest_number: int = 10
    """Largest number of a problem."""
    countdown_largest_target: int = 40
    """Largest target, and largest number on the demonstrated way to it."""
    countdown_failures: int = 4
    """Attempts that fail before the one that works, at most, in a demonstration."""
    arithmetic_operators: str = "+-*"
    """Operators to choose from, each as often."""
    arithmetic_digits: int = 2
    """Most digits of a number; all lengths are as frequent."""
    arithmetic_least_digits: int = 1
    """Fewest digits of a number."""
    path: str = ""
    """json_lines: the .jsonl file."""
    problem_field: str = "problem"
    """json_lines: field that holds the problem."""
    answer_field: str = "answer"
    """json_lines: field that holds the answer."""
    verifier: Literal["exact", "math"] = "exact"
    """json_lines: whether an answer has to be word for word, or mathematically, the same (the library math-verify)."""
    gym_dataset: str = ""
    """gym: name of the dataset, such as chain_sum."""
    gym_options: str = "{}"
    """gym: options of the dataset, a JSON object."""
    verifier_processes: int = 2
    """Processes that verifiers of libraries run in."""
    verifier_seconds: float = 10.0
    """That such a verifier may take for an answer; then it is killed, and the answer counted as without verdict."""
