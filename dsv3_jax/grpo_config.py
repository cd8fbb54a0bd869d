"""The section `grpo` of a configuration (config.py)."""

from dataclasses import dataclass
from typing import Literal

KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimisation (DeepSeekMath section 4, R1 section 2.2). `training.batch_size` is the
    responses of an update, `training.sequence_length` the positions of a row that they are packed into."""

    prompts: int = 32
    """Prompts of a rollout."""
    group_size: int = 8
    """Responses to each prompt."""
    updates_per_rollout: int = 1
    """Updates that the responses of a rollout are dealt out to at random; prompts * group_size is this many times
    training.batch_size."""
    prompt_tokens: int = 64
    """Longest prompt."""
    max_new_tokens: int = 64
    """Longest response; one that has not come to its end by then is truncated."""
    temperature: float = 1.0
    """Of the sampler; it divides the logits in every log probability of the loss as well."""
    replay_routing: bool = True
    """Send every token to the experts that the sampler had sent it to."""

    advantage_std: bool = True
    """Divide advantages by the standard deviation of their group; without it as in Dr. GRPO."""
    aggregation: Literal["sequence", "token", "constant"] = "token"
    """Mean over each response, then over responses (DeepSeekMath); over all tokens (DAPO); sum over tokens, over
    responses and max_new_tokens (Dr. GRPO)."""
    clip_low: float = 0.2
    """A token whose probability has fallen by more than this share has no further gradient down."""
    clip_high: float = 0.2
    """A token whose probability has risen by more than this share has no further gradient up; 10 in R1."""
    importance_cap: float | None = 2.0
    """Largest weight that corrects for a sampler whose probabilities are not the trainer's; None: no correction."""
    kl_weight: float = 0.0
    """Beta, on the KL to the reference; 0: no reference is kept. 0.001 in R1, 0.04 in DeepSeekMath."""
    kl_estimator: KLEstimator = "k3"
    """-log q, (log q)^2 / 2 or q - 1 - log q, of q = reference / policy (posttraining/grpo_loss.py)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """In the loss, token by token (R1); or taken off the reward, summed over the response."""
    reference_interval: int = 0
    """Updates between two times that the reference becomes the policy; 0: it stays the first one. 400 in R1."""

    accuracy_weight: float = 1.0
    """Weight of the verifier's accuracy in the reward."""
    format_weight: float = 0.1
    """Weight of the form in the reward; equal to accuracy's in R1-Zero."""
    language_weight: float = 0.0
    """Weight of the share of words in grpo.language (R1)."""
    language: Literal["latin", "han"] = "latin"
    """Script of the words that count."""
    overlong_penalty: float = 0.0
    """Taken off the reward of a truncated response."""
    overlong_tokens: int = 0
    """Last tokens before the longest response over which the penalty rises from 0 (DAPO)."""
