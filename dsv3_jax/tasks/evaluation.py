"""How well a model solves a task: pass@1 of greedy responses, pass@k of sampled ones, and what they are like."""

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.tasks.problem import Problem, Verdict, verdict_on
from dsv3_jax.tasks.responses import Responder, Response

VERIFIERS_AT_ONCE = 8


@dataclass(frozen=True)
class Judged:
    """A response and what it is worth."""

    response: Response
    verdict: Verdict


@dataclass(frozen=True)
class Figures:
    """Means over responses."""

    responses: int
    rewards: dict[str, float]
    """Of every reward part; responses that no verdict was come to are left out."""
    pass_at: dict[int, float]
    """By k: the probability that of k samples of a problem at least one is correct."""
    tokens: float
    """Of a response, its end included."""
    ended: float
    """Share of responses that the model ended itself."""
    failed: dict[str, int]
    """Responses that no verdict was come to, by the reason; in pass@k they count as wrong."""


@dataclass(frozen=True)
class TaskEvaluation:
    """Of one model on some problems of a task."""

    problems: int
    greedy: Figures
    sampled: Figures


def evaluate(
    responder: Responder, problems: Sequence[Problem], sampling: Sampling, max_new_tokens: int, samples: int
) -> tuple[TaskEvaluation, list[list[Judged]], list[list[Judged]]]:
    """The figures, then the judged responses themselves: greedy, and sampled, each [problem][sample].

    Raises EngineError as `Responder.respond` does.
    """
    greedy = judged(problems, responder.respond(problems, Sampling(temperature=0.0), max_new_tokens))
    sampled = judged(problems, responder.respond(problems, sampling, max_new_tokens, samples))
    return TaskEvaluation(len(problems), figures(greedy), figures(sampled)), greedy, sampled


def judged(problems: Sequence[Problem], responses: Sequence[Sequence[Response]]) -> list[list[Judged]]:
    """Every response with its verdict; of a verifier that raises, none. Verifiers in processes of their own are waited
    for side by side."""
    pairs = [(problem, one) for problem, of_problem in zip(problems, responses, strict=True) for one in of_problem]
    with ThreadPoolExecutor(VERIFIERS_AT_ONCE) as pool:
        verdicts = pool.map(lambda pair: Judged(pair[1], _verdict(pair[0], pair[1].text)), pairs)
        return [[next(verdicts) for _ in of_problem] for of_problem in responses]


def _verdict(problem: Problem, text: str) -> Verdict:
    try:
        return problem.verify(text)
    except Exception as error:
        # It should not (problem.py); a task that somebody else wrote is not to cost the run.
        return verdict_on(False, 0.0, f"the verifier raised {type(error).__name__}")


def figures(judged: Sequence[Sequence[Judged]]) -> Figures:
    """Means over all responses, [problem][sample], with as many samples of every problem."""
    every = [one for of_problem in judged for one in of_problem]
    samples = len(every) // len(judged)
    correct = [sum(one.verdict.correct for one in of_problem) for of_problem in judged]
    judgeable = [one.verdict.rewards for one in every if one.verdict.failed is None]
    return Figures(
        len(every),
        {name: _mean([rewards[name] for rewards in judgeable]) for name in (judgeable[0] if judgeable else ())},
        {k: _mean([pass_at(k, samples, count) for count in correct]) for k in _powers_of_two(samples)},
        _mean([len(one.response.token_ids) for one in every]),
        _mean([one.response.ended for one in every]),
        dict(Counter(one.verdict.failed for one in every if one.verdict.failed is not None)),
    )


def pass_at(k: int, samples: int, correct: int) -> float:
    """The unbiased estimate of pass@k from `samples` >= k draws of which `correct` are correct: of all ways to take k
    of them, the share with a correct one (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
