"""The loss against a slow numpy oracle, for every option; its gradient against REINFORCE and exact expectations."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.grpo_config import GRPOConfig
from dsv3_jax.posttraining.grpo_loss import TokenValues, grpo_loss, kl_estimate, token_weights

LOSS = jax.jit(grpo_loss, static_argnums=3)
GRADIENT = jax.jit(jax.grad(lambda new, values, config: grpo_loss(new, new, values, config).loss), static_argnums=2)
LENGTHS, JUDGED = [5, 2, 9, 1], [True, True, True, False]
OPTIONS = [
    GRPOConfig(aggregation=aggregation, kl_weight=kl_weight, kl_estimator=estimator, kl_in=place, importance_cap=cap,
               clip_low=low, clip_high=high, updates_per_rollout=updates)
    for aggregation, (kl_weight, estimator, place), cap, (low, high), updates in [
        ("sequence", (0.0, "k3", "loss"), None, (0.2, 0.2), 2),
        ("token", (0.3, "k1", "loss"), 1.1, (0.1, 0.3), 2),
        ("constant", (0.3, "k2", "loss"), 1.1, (0.2, 10.0), 2),
        ("token", (0.3, "k3", "loss"), None, (10.0, 10.0), 2),
        ("sequence", (0.3, "k3", "reward"), 2.0, (0.2, 0.28), 2),
        ("constant", (0.3, "k3", "loss"), 1.05, (0.2, 0.2), 1),
    ]
]  # fmt: skip


class Responses:
    """Four responses, a row each, after prompts of three positions; the last has no verdict."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.shape = (4, 14)
        self.new, self.old, self.sampler, self.reference = (
            np.float32(-2 + 0.3 * random.normal(size=self.shape)) for _ in range(4)
        )
        self.advantages = [1.5, -0.5, -1.0, 0.7]

    def values(self, config: GRPOConfig) -> TokenValues:
        counted = np.zeros(self.shape, bool)
        weights, advantages = np.full(self.shape, np.nan, np.float32), np.full(self.shape, np.nan, np.float32)
        each = token_weights(np.array(LENGTHS), np.array(JUDGED), config)
        for row, length in enumerate(LENGTHS):
            counted[row, 3 : 3 + length] = JUDGED[row]
            weights[row, 3 : 3 + length], advantages[row, 3 : 3 + length] = each[row], self.advantages[row]

        def known(logprobs: np.ndarray) -> np.ndarray:
            # What lies outside of responses must not matter, whatever it is.
            return np.where(counted, logprobs, -np.inf).astype(np.float32)

        return TokenValues(counted, weights, advantages, *map(known, (self.sampler, self.old, self.reference)))

    def oracle(self, config: GRPOConfig) -> float:
        """The equations read aloud, one response and one token at a time."""
        of_responses, tokens = [], 0
        for row, length in enumerate(LENGTHS):
            if not JUDGED[row]:
                continue
            of_tokens = []
            for at in range(3, 3 + length):
                new, sampler, reference = (float(array[row, at]) for array in (self.new, self.sampler, self.reference))
                old = new if config.updates_per_rollout == 1 else float(self.old[row, at])
                rho, advantage = np.exp(new - old), self.advantages[row]
                clipped = min(max(rho, 1 - config.clip_low), 1 + config.clip_high)
                surrogate = min(rho * advantage, clipped * advantage)
                if config.importance_cap is not None:
                    surrogate *= min(np.exp(old) / np.exp(sampler), config.importance_cap)
                if config.kl_weight and config.kl_in == "loss":
                    q = np.exp(reference) / np.exp(new)
                    kl = {"k1": -np.log(q), "k2": np.log(q) ** 2 / 2, "k3": q - np.log(q) - 1}[config.kl_estimator]
                    surrogate -= config.kl_weight * kl
                of_tokens.append(surrogate)
            tokens += length
            of_responses.append(of_tokens)
        if config.aggregation == "sequence":
            return -float(np.mean([np.mean(of_tokens) for of_tokens in of_responses]))
        total = sum(map(sum, of_responses))
        return -total / (tokens if config.aggregation == "token" else len(of_responses) * config.max_new_tokens)


@pytest.mark.parametrize("config", OPTIONS, ids=range(len(OPTIONS)))
def test_the_loss_is_that_of_the_oracle(config: GRPOConfig):
    responses = Responses()
    sums = LOSS(responses.new, np.ones(responses.shape), responses.values(config), config)
    assert float(sums.loss) == pytest.approx(responses.oracle(config), rel=2e-6)
    assert float(sums.tokens) == float(sums.entropy) == 5 + 2 + 9


@pytest.mark.parametrize("config", OPTIONS, ids=range(len(OPTIONS)))
def test_trap_L5_nothing_outside_of_responses_has_a_gradient(config: GRPOConfig):
    responses = Responses()
    values = responses.values(config)
    new = np.where(values.counted, responses.new, -np.inf)
    gradient = np.asarray(GRADIENT(new, values, config))
    assert np.isfinite(gradient).all() and not gradient[~values.counted].any() and gradient[values.counted].any()


def test_what_is_told_of_clipping_and_mismatch():
    responses, config = Responses(), GRPOConfig(updates_per_rollout=2, clip_low=0.1, clip_high=0.2, importance_cap=1.2)
    values = responses.values(config)
    sums = LOSS(responses.new, responses.new, values, config)
    counted = values.counted
    rho, importance = np.exp(responses.new - responses.old)[counted], np.exp(responses.old - responses.sampler)[counted]
    up = values.advantages[counted] > 0
    assert float(sums.clipped_low) == ((rho < 0.9) & ~up).sum() > 0
    assert float(sums.clipped_high) == ((rho > 1.2) & up).sum() > 0
    assert float(sums.importance_capped) == (importance > 1.2).sum() > 0
    assert float(sums.ratio) == pytest.approx(rho.sum(), rel=1e-6)
    assert float(sums.mismatch) == pytest.approx(np.abs(np.log(importance)).sum(), rel=1e-5)
    assert float(sums.mismatch_kl) == pytest.approx(-np.log(importance).sum(), rel=1e-5)


def test_a_clipped_token_has_no_gradient_and_one_that_comes_back_has():
    config = GRPOConfig(updates_per_rollout=2, importance_cap=None, aggregation="constant", max_new_tokens=1)
    ratios, advantages = np.array([[1.5, 1.5, 0.5, 0.5]]), np.array([[1.0, -1.0, 1.0, -1.0]])
    ones, zeros = np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)
    values = TokenValues(ones > 0, ones, advantages, zeros, zeros, zeros)
    gradient = GRADIENT(np.log(ratios), values, config)
    np.testing.assert_allclose(gradient, -np.where([[False, True, True, False]], ratios * advantages, 0), rtol=1e-6)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_the_first_gradient_on_policy_is_that_of_reinforce(aggregation):
    """grad of -sum of weight * A * log pi: another formula, of the logits of a policy."""
    responses = Responses()
    config = GRPOConfig(aggregation=aggregation, importance_cap=None)
    values = responses.values(config)
    random = np.random.default_rng(3)
    logits, labels = random.normal(size=(*responses.shape, 7)), random.integers(0, 7, responses.shape)

    def logprobs(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]

    def reinforce(logits):
        denominators = {"sequence": [3 * length for length in LENGTHS], "token": [16] * 4, "constant": [3 * 64] * 4}
        total = 0.0
        for row, length in enumerate(LENGTHS[:3]):
            of_response = logprobs(logits)[row, 3 : 3 + length].sum()
            total += responses.advantages[row] * of_response / denominators[aggregation][row]
        return -total

    ours = jax.jit(jax.grad(lambda logits: grpo_loss(logprobs(logits), jnp.zeros(()), values, config).loss))(logits)
    theirs = jax.jit(jax.grad(reinforce))(logits)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)
    assert np.abs(theirs).max() > 1e-3


def test_trap_L14_the_loss_on_policy_is_0_and_its_gradient_is_not():
    """With one length for all and advantages that sum to 0, as those of a group do."""
    values = TokenValues(
        np.ones((2, 6), bool), np.full((2, 6), 1 / 12, np.float32), np.array([[1.0] * 6, [-1.0] * 6], np.float32),
        *[np.full((2, 6), -1.0, np.float32)] * 3,
    )  # fmt: skip
    new = np.full((2, 6), -1.0, np.float32)
    assert abs(float(LOSS(new, new, values, GRPOConfig()).loss)) < 1e-7
    assert np.abs(GRADIENT(new, values, GRPOConfig())).min() > 0.05


def test_trap_L4_what_the_gradient_of_each_estimator_is_on_average():
    """Exactly, over all tokens of a small vocabulary: none of k1, of KL(policy || reference) of k2, of KL(reference ||
    policy) of k3. All but k2 estimate the KL itself without bias."""
    random = np.random.default_rng(5)
    logits, reference = random.normal(size=6), jax.nn.log_softmax(random.normal(size=6))
    drawn = jax.nn.softmax(logits)

    def estimate(estimator):
        return jax.jit(lambda logits: (drawn * kl_estimate(estimator, jax.nn.log_softmax(logits), reference)).sum())

    def reverse(logits):
        new = jax.nn.log_softmax(logits)
        return (jnp.exp(new) * (new - reference)).sum()

    def forward(logits):
        return (jnp.exp(reference) * (reference - jax.nn.log_softmax(logits))).sum()

    assert float(estimate("k1")(logits)) == pytest.approx(float(reverse(logits)), rel=1e-5)
    assert float(estimate("k3")(logits)) == pytest.approx(float(reverse(logits)), rel=1e-5)
    assert (kl_estimate("k3", jax.nn.log_softmax(logits), reference) >= 0).all()
    np.testing.assert_allclose(jax.grad(estimate("k1"))(logits), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(estimate("k2"))(logits), jax.grad(reverse)(logits), atol=1e-6)
    np.testing.assert_allclose(jax.grad(estimate("k3"))(logits), jax.grad(forward)(logits), atol=1e-6)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_trap_L3_parts_of_a_batch_add_up_to_the_whole(aggregation):
    config = dataclasses.replace(OPTIONS[3], aggregation=aggregation)
    responses = Responses()
    values = responses.values(config)

    whole = GRADIENT(responses.new, values, config)
    for split in ([0, 1], [2, 3]), ([0], [1, 2, 3]), ([0], [1], [2], [3]):
        of_parts = [values._replace(counted=values.counted & np.isin(np.arange(4), rows)[:, None]) for rows in split]
        parts = [GRADIENT(responses.new, part, config) for part in of_parts]
        np.testing.assert_allclose(sum(parts), whole, rtol=1e-6, atol=1e-9)


def test_responses_without_a_verdict_are_in_no_denominator():
    for aggregation, lengths in itertools.product(("sequence", "token", "constant"), ([4, 6], [9, 1])):
        config = GRPOConfig(aggregation=aggregation)
        with_it = token_weights(np.array([*lengths, 7]), np.array([True, True, False]), config)
        without = token_weights(np.array(lengths), np.array([True, True]), config)
        np.testing.assert_array_equal(with_it, [*without, 0])
    assert not token_weights(np.array([3, 3]), np.array([False, False]), GRPOConfig()).any()
