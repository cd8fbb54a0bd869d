"""One rollout: problems, responses of the policy to each, and what they are worth. All of it follows from the rollout's
number, the configuration and the parameters, so that a run that resumes makes the same ones."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from dsv3_jax import tasks
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.inference.chat import ChatTemplate, chat_template
from dsv3_jax.inference.stopping import turn_end
from dsv3_jax.model.functional import Tree
from dsv3_jax.posttraining.grpo_batch import Sample
from dsv3_jax.posttraining.rewards import Reward, reward_of
from dsv3_jax.posttraining.sampler import Sampler
from dsv3_jax.tasks import Problem, Task
from dsv3_jax.tasks.evaluation import Figures, Judged, figures, judged
from dsv3_jax.tasks.responses import Response, response_text

ROLLOUTS, EVALUATIONS, DEALING = 0, 1, 2
"""Purposes of random streams."""


class Rollout(NamedTuple):
    """Lists of [prompts][group]."""

    samples: list[list[Sample]]
    judged: list[list[Judged]]
    rewards: list[list[Reward]]
    sampling_seconds: float
    verifying_seconds: float

    def column(self, name: str) -> np.ndarray:
        """A field of every reward, or one of its parts: float64 [prompts, group]."""

        def value(reward: Reward) -> float:
            return reward.parts[name] if name in reward.parts else getattr(reward, name)

        return np.array([[value(reward) for reward in group] for group in self.rewards])

    @property
    def judged_PG(self) -> np.ndarray:
        """bool: there is a verdict."""
        return np.array([[one.verdict.failed is None for one in group] for group in self.judged])


def open_rollouts(config: Config, mesh: Mesh, tokenizer: Tokenizer, files: Mapping[str, str] | None) -> "Rollouts":
    """Rollouts of the configuration's task; `files` are the texts that came with the model.

    Raises:
        ConfigError: a prompt longer than grpo.prompt_tokens.
        ChatError: no chat template for this tokenizer.
        PlacementError: a mesh that models cannot generate on.
    """
    template = chat_template(files, tokenizer)
    sampler = Sampler(config, mesh, tokenizer, turn_end(template, tokenizer))
    rollouts = Rollouts(config, tasks.build(config.task), sampler, template, tokenizer)
    for problem in (rollouts.task.problem(0), *rollouts.task.validation, *rollouts.task.held_out):
        rollouts.prompt_ids(problem)
    return rollouts


class Rollouts:
    """Makes rollouts of a task."""

    def __init__(self, config: Config, task: Task, sampler: Sampler, template: ChatTemplate, tokenizer: Tokenizer):
        self.task = task
        self._config, self._sampler = config, sampler
        self._template, self._tokenizer = template, tokenizer

    @property
    def known_W(self) -> np.ndarray:
        """bool, the ids that can be sampled."""
        return np.asarray(self._sampler.vocabulary.known_W)

    def training(self, parameters: Tree, router_bias: Tree, number: int) -> Rollout:
        """Rollout `number` of the run."""
        grpo = self._config.grpo
        indices = range(number * grpo.prompts, (number + 1) * grpo.prompts)
        problems = [self.task.problem(index) for index in indices]
        stream = stream_of(self._config, ROLLOUTS, number)
        return self._made(parameters, router_bias, problems, grpo.temperature, stream)

    def evaluation(
        self, parameters: Tree, router_bias: Tree, problems: Sequence[Problem], temperature: float
    ) -> Figures:
        """Of group_size responses to each problem, pass@1 and pass@group_size among others; the same at every call.
        Temperature 0 is greedy."""
        size, judged = self._config.grpo.prompts, list[list[Judged]]()
        for first in range(0, len(problems), size):
            stream = stream_of(self._config, EVALUATIONS, first)
            judged += self._made(parameters, router_bias, problems[first : first + size], temperature, stream).judged
        return figures(judged)

    def _made(
        self, parameters: Tree, router_bias: Tree, problems: Sequence[Problem], temperature: float, stream: int
    ) -> Rollout:
        start = time.perf_counter()
        prompts = [self.prompt_ids(problem) for problem in problems]
        samples = self._sampler(parameters, router_bias, prompts, temperature, stream)
        sampled = time.perf_counter()
        responses = [
            [self._response(prompt, sample) for sample in group] for prompt, group in zip(prompts, samples, strict=True)
        ]
        verdicts = judged(problems, responses)
        rewards = [[reward_of(one, self._config.grpo) for one in group] for group in verdicts]
        return Rollout(samples, verdicts, rewards, sampled - start, time.perf_counter() - sampled)

    def prompt_ids(self, problem: Problem) -> list[int]:
        """The prompt as the model's chat template writes it. Raises ConfigError for one that is too long."""
        ids = self._template.token_ids([{"role": "user", "content": problem.prompt}])
        if len(ids) > self._config.grpo.prompt_tokens:
            raise ConfigError(
                f"grpo.prompt_tokens={self._config.grpo.prompt_tokens} must be at least {len(ids)}, the tokens of the "
                f"prompt {problem.prompt[:60]!r}"
            )
        return ids

    def _response(self, prompt: list[int], sample: Sample) -> Response:
        ids, end = sample.response_ids_m.tolist(), self._sampler.end
        return Response(prompt, ids, response_text(self._tokenizer, prompt, ids, [end]), ids[-1] == end)


def stream_of(config: Config, purpose: int, number: int) -> int:
    """Seed of one of the run's random streams, independent of the others: 0 to 2^32 - 1."""
    return int(np.random.SeedSequence([config.seed, purpose, number]).generate_state(1)[0])


def dealt(samples: int, config: Config, number: int) -> np.ndarray:
    """Which responses of rollout `number` go into each of its updates: [updates_per_rollout, batch_size]."""
    order = np.random.default_rng(stream_of(config, DEALING, number)).permutation(samples)
    return order.reshape(config.grpo.updates_per_rollout, -1)
