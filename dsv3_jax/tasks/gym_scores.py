"""Questions of reasoning-gym and scores of answers to them. Scores run in a process of their own, by themselves."""

import functools
import json
from typing import Any

import reasoning_gym

SIZE = 2**31 - 1
"""Questions of a dataset: each is made when asked for."""


@functools.lru_cache(maxsize=4)
def dataset(name: str, options: str) -> Any:
    """`options`: a JSON object. Raises whatever reasoning-gym does of a name or an option that it does not know."""
    return reasoning_gym.create_dataset(name, **{**json.loads(options), "seed": 0, "size": SIZE})


def question(name: str, options: str, index: int) -> str:
    return dataset(name, options)[index]["question"]


def score(name: str, options: str, index: int, answer: str) -> float:
    """From 0 to 1; between them for what the dataset finds partly right."""
    questions = dataset(name, options)
    return float(questions.score_answer(answer, questions[index]))
