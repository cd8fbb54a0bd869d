"""What a response is worth: the verifier's parts, the language it thinks in, and what is taken off for its length."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Literal, NamedTuple

from dsv3_jax.errors import UserError
from dsv3_jax.grpo_config import GRPOConfig
from dsv3_jax.tasks.evaluation import Judged
from dsv3_jax.tasks.problem import ACCURACY, FORMAT
from dsv3_jax.tasks.responses import Response

WORD = re.compile(r"[^\W\d_]+")
THINKING = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)


class RewardError(UserError, ValueError):
    """A reward that a verifier may not give."""


class Reward(NamedTuple):
    total: float
    verified: float
    """The part of it that the verifier gave."""
    parts: Mapping[str, float]
    """Before their weights: accuracy, format, language, overlong."""


def reward_of(judged: Judged, config: GRPOConfig) -> Reward:
    """The weighted sum of accuracy, format and language, less what too long a response costs.

    Raises:
        RewardError: the verifier gave a reward outside of 0 to 1, or leaves one out.
    """
    response, verdict = judged.response, judged.verdict
    for name in (ACCURACY, FORMAT):
        if not 0.0 <= verdict.rewards.get(name, -1.0) <= 1.0:
            given = verdict.rewards.get(name)
            raise RewardError(f"the verifier's reward {name}={given} must be between 0 and 1")
    accuracy, form = verdict.rewards[ACCURACY], verdict.rewards[FORMAT]
    language = language_consistency(response.text, config.language) if config.language_weight else 0.0
    overlong = overlong_share(response, config)
    verified = config.accuracy_weight * accuracy + config.format_weight * form
    total = verified + config.language_weight * language - config.overlong_penalty * overlong
    return Reward(total, verified, {ACCURACY: accuracy, FORMAT: form, "language": language, "overlong": overlong})


def overlong_share(response: Response, config: GRPOConfig) -> float:
    """1 for a response that was cut off; over the last `overlong_tokens` before that, rising to it (DAPO section 3.4).

    0 for all others.
    """
    if not response.ended:
        return 1.0
    over = len(response.token_ids) - (config.max_new_tokens - config.overlong_tokens)
    return max(over, 0) / (config.overlong_tokens + 1)


def language_consistency(text: str, script: Literal["latin", "han"]) -> float:
    """Share of the words in the thinking that are written in the script (R1 section 2.3.2); 1 of no words at all.

    A run of Han characters has no spaces: each of them counts as a word.
    """
    thinking = THINKING.search(text)
    words: list[str] = []
    for word in WORD.findall(thinking[1] if thinking else text):
        words += list(word) if _script(word[0]) == "han" else [word]
    if not words:
        return 1.0
    return sum(all(_script(letter) == script for letter in word) for word in words) / len(words)


def _script(letter: str) -> str:
    name = unicodedata.name(letter, "")
    return "han" if name.startswith("CJK") else name.partition(" ")[0].lower()
