"""From a configuration to its task."""

from collections.abc import Callable

from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks.arithmetic import arithmetic
from dsv3_jax.tasks.countdown import countdown
from dsv3_jax.tasks.gym import gym
from dsv3_jax.tasks.json_lines import json_lines
from dsv3_jax.tasks.problem import Task


def build(config: TaskConfig) -> Task:
    """The task of a checked configuration.

    Raises:
        ConfigError: more problems are asked for than there are, or a library is missing.
        TaskError, DataError: a file of problems that cannot be used.
    """
    kinds: dict[str, Callable[[TaskConfig], Task]] = {
        "arithmetic": arithmetic,
        "countdown": countdown,
        "gym": gym,
        "json_lines": json_lines,
    }
    return kinds[config.kind](config)
