"""From a configuration to its task."""

from collections.abc import Callable

from dsv3_jax.config import TaskConfig
from dsv3_jax.tasks.arithmetic import arithmetic
from dsv3_jax.tasks.countdown import countdown
from dsv3_jax.tasks.problem import Task


def build(config: TaskConfig) -> Task:
    """The task of a checked configuration.

    Raises:
        ConfigError: more problems are asked for than there are.
    """
    kinds: dict[str, Callable[[TaskConfig], Task]] = {"arithmetic": arithmetic, "countdown": countdown}
    return kinds[config.kind](config)
