"""Tasks of reasoning-gym, a library of more than a hundred generators of problems with verifiers."""

import importlib.util
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_jax.config import ConfigError
from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks.generated import GeneratedTask
from dsv3_jax.tasks.problem import Verdict, answer_in, verdict_on
from dsv3_jax.tasks.verifier_process import VerifierFailure, VerifierPool


@dataclass(frozen=True)
class GymProblem:
    """Question `index` of a dataset."""

    prompt: str
    name: str
    options: str
    index: int
    pool: VerifierPool = field(repr=False, compare=False)

    @property
    def key(self) -> str:
        """The question's own words: what else would be the same problem, only its generator knows."""
        return f"{self.name}: {self.prompt}"

    def verify(self, response: str) -> Verdict:
        answer = answer_in(response)
        if answer is None:
            return verdict_on(False, 0.0)
        try:
            score = self.pool.call(self.name, self.options, self.index, answer)
        except VerifierFailure as failure:
            return verdict_on(True, 0.0, str(failure))
        return verdict_on(True, min(max(score, 0.0), 1.0))


def gym(config: TaskConfig) -> GeneratedTask[GymProblem]:
    """The dataset `task.gym_dataset` of reasoning-gym with `task.gym_options`.

    Raises:
        ConfigError: the library is not installed, or does not know the dataset or an option.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("task.kind=gym needs reasoning-gym: pip install reasoning-gym")
    from dsv3_jax.tasks import gym_scores  # the library, which is optional

    try:
        if not isinstance(json.loads(config.gym_options), dict):
            raise ValueError("it must be an object of JSON")
    except ValueError as error:
        raise ConfigError(f"task.gym_options={config.gym_options!r}: {error}") from error
    try:
        gym_scores.question(config.gym_dataset, config.gym_options, 0)
    except Exception as error:  # the library raises ValueError, TypeError, AssertionError, as each dataset pleases
        message = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"task.gym_dataset={config.gym_dataset!r} with task.gym_options={config.gym_options!r}: {message}"
        ) from error
    pool = VerifierPool(
        Path(gym_scores.__file__), "score", processes=config.verifier_processes, seconds=config.verifier_seconds
    )

    def draw(stream: random.Random) -> GymProblem:
        index = stream.randrange(gym_scores.SIZE)
        prompt = gym_scores.question(config.gym_dataset, config.gym_options, index)
        return GymProblem(prompt, config.gym_dataset, config.gym_options, index, pool)

    return GeneratedTask(config, draw)
