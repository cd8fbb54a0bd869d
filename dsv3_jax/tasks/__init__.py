"""Tasks with verifiable answers. `build(config.task)` makes the one that a configuration asks for."""

from dsv3_jax.tasks.building import build
from dsv3_jax.tasks.problem import DemonstratedProblem, Problem, Task, TaskError, Verdict

__all__ = ["DemonstratedProblem", "Problem", "Task", "TaskError", "Verdict", "build"]
