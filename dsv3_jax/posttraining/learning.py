"""From a rollout to its updates: advantages, packed batches, what the trainer and the reference say of the tokens."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.posttraining.advantages import Advantages, group_advantages
from dsv3_jax.posttraining.grpo_batch import Packed, packed
from dsv3_jax.posttraining.grpo_loss import kl_estimate, token_weights
from dsv3_jax.posttraining.grpo_state import GRPOState
from dsv3_jax.posttraining.grpo_step import Scorer
from dsv3_jax.posttraining.rollout import Rollout, dealt


class Learning(NamedTuple):
    """Everything that the updates on one rollout need."""

    updates: list[Packed]
    advantages: Advantages
    rewards_PG: np.ndarray
    """What was maximised: the rewards, less the KL where it is in them."""


def learning_of(
    rollout: Rollout, number: int, state: GRPOState, score: Scorer, config: Config, shards: int
) -> Learning:
    """The rollout dealt out to its updates, before the first of them."""
    grpo, training = config.grpo, config.training
    rewards_PG, judged_PG = rollout.column("total"), rollout.judged_PG
    samples = [sample for group in rollout.samples for sample in group]
    deals = dealt(len(samples), config, number)

    def rows(deal: np.ndarray) -> Packed:
        some = [samples[index] for index in deal]
        return packed(some, training.batch_size, training.sequence_length, training.microbatches, shards)

    updates = [rows(deal) for deal in deals]
    if grpo.updates_per_rollout > 1 or grpo.kl_weight:
        updates = [_scored(update, state, score, config) for update in updates]
    if grpo.kl_weight and grpo.kl_in == "reward":
        kl_N = np.empty(len(samples))
        for deal, update in zip(deals, updates, strict=True):
            kl_N[deal] = list(kl_of_responses(update, config))
        rewards_PG = rewards_PG - grpo.kl_weight * kl_N.reshape(rewards_PG.shape)
    advantages = group_advantages(rewards_PG, rollout.column("verified"), judged_PG, grpo.advantage_std)
    lengths_N = np.array([len(sample.response_ids_m) for sample in samples])
    judged_N, advantages_N = judged_PG.reshape(-1), advantages.values_PG.reshape(-1)
    updates = [
        update.with_values(
            counted=judged_N[deal],
            weights=token_weights(lengths_N[deal], judged_N[deal], grpo),
            advantages=advantages_N[deal],
        )
        for deal, update in zip(deals, updates, strict=True)
    ]
    return Learning(updates, advantages, rewards_PG)


def _scored(update: Packed, state: GRPOState, score: Scorer, config: Config) -> Packed:
    old = np.zeros_like(update.batch.values.old_logprobs)
    reference = old
    if config.grpo.updates_per_rollout > 1 or config.grpo.kl_in == "reward":
        old = jax.device_get(score(state.parameters, state.router_bias, update.batch, update.used))
    if config.grpo.kl_weight:
        reference = jax.device_get(score(state.reference, state.router_bias, update.batch, update.used))
    return update.with_scores(old, reference)


def kl_of_responses(update: Packed, config: Config) -> Iterator[float]:
    """The estimated KL to the reference of every response, summed over its tokens."""
    values = update.batch.values
    for row, start, stop in update.places:
        old, reference = values.old_logprobs[row, start:stop], values.reference_logprobs[row, start:stop]
        yield float(np.sum(kl_estimate(config.grpo.kl_estimator, old, reference)))
