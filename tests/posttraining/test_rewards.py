import pytest

from dsv3_jax.grpo_config import GRPOConfig
from dsv3_jax.posttraining.rewards import RewardError, language_consistency, overlong_share, reward_of
from dsv3_jax.tasks.evaluation import Judged
from dsv3_jax.tasks.problem import Verdict
from dsv3_jax.tasks.responses import Response

RIGHT = Verdict({"accuracy": 1.0, "format": 1.0})
CONFIG = GRPOConfig(format_weight=0.2, language_weight=0.5, overlong_penalty=0.3, overlong_tokens=9, max_new_tokens=20)


def response(text: str, tokens: int, ended: bool = True) -> Response:
    return Response([0], [1] * tokens, text, ended)


def test_parts_are_weighted_and_what_the_verifier_gave_is_kept_apart():
    reward = reward_of(Judged(response("<think>so 因此</think><answer>7</answer>", 16), RIGHT), CONFIG)
    assert reward.parts == {"accuracy": 1.0, "format": 1.0, "language": pytest.approx(1 / 3), "overlong": 0.5}
    assert reward.verified == pytest.approx(1.2)
    assert reward.total == pytest.approx(1.2 + 0.5 / 3 - 0.3 * 0.5)


@pytest.mark.parametrize(
    ("tokens", "truncated", "share"),
    [(1, False, 0.0), (11, False, 0.0), (12, False, 0.1), (20, False, 0.9), (20, True, 1.0)],
)  # fmt: skip
def test_a_truncated_response_is_overlong_and_the_last_tokens_before_more_and_more(tokens, truncated, share):
    assert overlong_share(response("", tokens, not truncated), CONFIG) == pytest.approx(share)


def test_without_a_margin_only_truncation_costs():
    config = GRPOConfig(max_new_tokens=20)
    assert [overlong_share(response("", 20, ended), config) for ended in (True, False)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "script", "share"),
    [
        ("<think>one two</think><answer>三</answer>", "latin", 1.0),
        ("<think>one 二三四</think>", "latin", 0.25),
        ("<think>one 二三四", "han", 0.75),
        ("no tags at all, да", "latin", 0.8),
        ("<think>1 + 2 = 3</think>", "latin", 1.0),
        ("<think>naïve café</think>", "latin", 1.0),
        ("", "han", 1.0),
    ],
)
def test_language_is_the_share_of_words_of_the_thinking(text, script, share):
    assert language_consistency(text, script) == pytest.approx(share)


@pytest.mark.parametrize("given", [1.5, -0.1, float("nan"), None])
def test_a_reward_out_of_range_is_refused(given):
    rewards = {"accuracy": 1.0} if given is None else {"accuracy": 1.0, "format": given}
    with pytest.raises(RewardError, match=f"the verifier's reward format={given} must be between 0 and 1"):
        reward_of(Judged(response("", 1), Verdict(rewards)), CONFIG)
