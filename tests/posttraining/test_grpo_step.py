"""Sampler and trainer on one model: the same log probabilities, the same experts, the same everything on every mesh."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config
from dsv3_jax.model.functional import parameter_specs, put_together, skeleton_of
from dsv3_jax.posttraining import grpo_step as module
from dsv3_jax.posttraining.grpo_batch import Packed, Sample, packed
from dsv3_jax.posttraining.grpo_loss import token_weights
from dsv3_jax.posttraining.grpo_state import GRPOState, abstract_grpo_state, first_grpo_state
from dsv3_jax.posttraining.grpo_step import make_grpo_step, make_scorer
from dsv3_jax.posttraining.sampler import Sampler
from dsv3_jax.training.optimizer import adamw
from dsv3_jax.training.state import TrainState
from sharding.mesh import one_device, row_shards, shardings
from tests.reference import transformer as reference

PROMPTS = [[5, 6, 7], [20, 30, 40, 50, 60, 70, 80, 90, 100, 110], [9], [11, 12, 13, 14], [33, 34]]
CAN_BE_DRAWN, END = 12, 7
"""The ids below, so that even a random model draws the one that ends a response now and then."""


class Setting:
    """The model on one device: its sampler, what it sampled, its step and its scorer."""

    def __init__(self, config: Config, trees: Any, tokenizer: Any):
        self.config, self.trees, self.mesh = config, trees, one_device()
        self.skeleton, self.tokenizer = skeleton_of(config.model), tokenizer
        self.known_W = np.arange(config.model.vocabulary) < CAN_BE_DRAWN
        self.samples = self.sampled_on(self.mesh)

    @cache  # noqa: B019
    def sampler(self, mesh: Any) -> Sampler:
        sampler = Sampler(self.config, mesh, self.tokenizer, END)
        sampler.vocabulary = sampler.vocabulary._replace(known_W=jnp.asarray(self.known_W))
        return sampler

    def sampled_on(self, mesh: Any, temperature: float = 0.7, stream: int = 5) -> list[Sample]:
        sampler = self.sampler(mesh)
        trees = jax.device_put(self.trees, shardings(mesh, parameter_specs(self.skeleton, mesh)))
        groups = sampler(*trees, PROMPTS, temperature, stream)
        assert [len(group) for group in groups] == [2] * 5
        return [sample for group in groups for sample in group]

    def packed(self, microbatches: int = 1, shards: int = 1) -> Packed:
        """The samples with made-up advantages; the third has no verdict."""
        config, samples = self.config, self.samples
        lengths = np.array([len(sample.response_ids_m) for sample in samples])
        judged = np.arange(len(samples)) != 2
        advantages = np.linspace(-1.5, 1.0, len(samples))
        rows = packed(samples, 16, config.training.sequence_length, microbatches, shards)
        return rows.with_values(
            counted=judged, weights=token_weights(lengths, judged, config.grpo), advantages=advantages
        )

    def state(self) -> GRPOState:
        fresh = adamw(self.config, self.skeleton).init(self.trees[0])
        state = TrainState(jnp.zeros((), jnp.int32), *self.trees, fresh)
        return jax.tree.map(jnp.array, first_grpo_state(state, self.config))

    @cache  # noqa: B019
    def step(self, microbatches: int, mesh: Any = None) -> Any:
        mesh = mesh or self.mesh
        update = self.packed(microbatches, row_shards(mesh))
        config = with_microbatches(self.config, microbatches)
        step = make_grpo_step(config, self.skeleton, mesh, self.known_W)
        return quickly(step, abstract_grpo_state(config, self.skeleton, mesh), update.batch, update.used)

    @cache  # noqa: B019
    def stepped(self, microbatches: int) -> tuple[GRPOState, Any]:
        update = self.packed(microbatches)
        return self.step(microbatches)(self.state(), update.batch, update.used)

    @cache  # noqa: B019
    def scorer(self, replay: bool) -> Any:
        config = dataclasses.replace(self.config, grpo=dataclasses.replace(self.config.grpo, replay_routing=replay))
        score, update = (
            make_scorer(with_microbatches(config, 4), self.skeleton, self.mesh, self.known_W),
            self.packed(4),
        )
        return quickly(score, *self.trees, update.batch, update.used)

    def scores(self, replay: bool = True) -> tuple[np.ndarray, Packed]:
        update = self.packed(4)
        return np.asarray(self.scorer(replay)(*self.trees, update.batch, update.used)), update


def quickly(function: Any, *arguments: Any) -> Any:
    """Compiled without LLVM's optimisations: it runs once or twice."""
    return function.lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})


def with_microbatches(config: Config, microbatches: int) -> Config:
    # With these a first update is rate * g / (|g| + 1): gradients can be read back from the parameters.
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=50.0, warmup_steps=1, epsilon=1.0, weight_decay=0.0, clip_norm=1e9
    )
    training = dataclasses.replace(config.training, microbatches=microbatches)
    return dataclasses.replace(config, training=training, optimizer=optimizer)


@pytest.fixture(scope="module")
def setting(config, trees, tokenizer) -> Setting:
    return Setting(config, trees, tokenizer)


def gradients(before: Any, after: Any) -> Any:
    def gradient(old: jax.Array, new: jax.Array) -> np.ndarray:
        share = (np.asarray(old, np.float64) - np.asarray(new, np.float64)) / 50.0
        return share / (1 - np.abs(share))

    return jax.tree.map(gradient, before, after)


def assert_close(left: Any, right: Any, share: float) -> None:
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=share * np.abs(one).max() + 1e-9)


# Sampling.


def test_responses_end_at_their_end_token_or_are_truncated(setting):
    lengths = [len(sample.response_ids_m) for sample in setting.samples]
    assert min(lengths) < max(lengths) == 12
    for sample in setting.samples:
        ids = sample.response_ids_m.tolist()
        assert END not in ids[:-1] and max(ids) < CAN_BE_DRAWN
        assert len(ids) == 12 or ids[-1] == END
        assert sample.logprobs_m.shape == (len(ids),) and (sample.logprobs_m < 0).all()
        assert sample.experts_SLK.shape == (sample.positions, 2, 2)


def test_the_samples_of_a_group_and_of_another_stream_differ(setting):
    ids = [sample.response_ids_m.tolist() for sample in setting.samples]
    assert all(ids[at] != ids[at + 1] for at in range(0, 10, 2))
    assert ids != [sample.response_ids_m.tolist() for sample in setting.sampled_on(setting.mesh, stream=6)]


def test_rollouts_on_eight_devices_are_those_on_one(setting, mesh_with):
    for one, other in zip(setting.samples, setting.sampled_on(mesh_with(fsdp=2, expert=2, tensor=2)), strict=True):
        np.testing.assert_array_equal(one.response_ids_m, other.response_ids_m)
        np.testing.assert_array_equal(one.experts_SLK, other.experts_SLK)
        np.testing.assert_allclose(one.logprobs_m, other.logprobs_m, atol=1e-5)


# Log probabilities.


def test_trap_L1_with_the_rollouts_experts_the_trainer_says_what_the_sampler_said(setting):
    scores, update = setting.scores()
    for sample, (row, start, stop) in zip(setting.samples, update.places, strict=True):
        np.testing.assert_allclose(scores[row, start:stop], sample.logprobs_m, atol=1e-5)


def test_trap_L1_the_experts_that_are_replayed_are_those_that_are_used(setting):
    """Of experts that nobody would have chosen the trainer says something else; without replay it does not look."""
    others = [sample._replace(experts_SLK=(sample.experts_SLK + 1) % 8) for sample in setting.samples]
    setting.samples, kept = others, setting.samples
    try:
        (replayed, update), (live, _) = setting.scores(), setting.scores(replay=False)
    finally:
        setting.samples = kept
    row, start, stop = update.places[0]
    assert np.abs(replayed[row, start:stop] - kept[0].logprobs_m).max() > 0.01
    np.testing.assert_allclose(live[row, start:stop], kept[0].logprobs_m, atol=1e-5)


def test_trap_L1_the_router_still_learns(setting):
    after, _ = setting.stepped(1)
    found = gradients(setting.trees[0], after.parameters)["moe_blocks"]["feed_forward"]["router"]["weight"]
    assert np.abs(found).max() > 1e-5


def test_trap_L2_the_temperature_is_in_every_logprob(setting):
    """Those of numpy's logits, divided by it, over the ids that can be drawn."""
    scores, update = setting.scores()
    sample, (row, start, stop) = setting.samples[3], update.places[3]
    tokens = np.concatenate([sample.prompt_ids_n, sample.response_ids_m])
    trees = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), setting.trees)
    logits = reference.logits(reference.plain_row(tokens), *trees, setting.config.model)[:, :CAN_BE_DRAWN] / 0.7
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = np.arange(len(sample.prompt_ids_n) - 1, len(tokens) - 1)
    np.testing.assert_allclose(scores[row, start:stop], expected[places, tokens[places + 1]], atol=1e-5)


# The step.


def test_trap_L3_any_split_gives_the_same_gradient(setting):
    (whole, of_whole), (split, of_split) = setting.stepped(1), setting.stepped(8)
    np.testing.assert_allclose(of_split.sums.loss, of_whole.sums.loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(of_split.mtp_loss, of_whole.mtp_loss, rtol=1e-5)
    found = gradients(setting.trees[0], whole.parameters)
    assert_close(found, gradients(setting.trees[0], split.parameters), 1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found))


def test_a_step_on_eight_devices_is_that_on_one(setting, mesh_with):
    mesh = mesh_with(data=2, fsdp=2, expert=2)
    update, step = setting.packed(2, row_shards(mesh)), setting.step(2, mesh)
    after, metrics = step(*jax.device_put((setting.state(), update.batch, update.used), step.input_shardings[0]))
    alone, of_one = setting.stepped(1)
    assert_close(
        gradients(setting.trees[0], alone.parameters),
        gradients(setting.trees[0], jax.device_get(after.parameters)),
        1e-5,
    )
    for one, other in zip(of_one.sums, metrics.sums, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_the_bias_of_the_router_is_frozen_and_the_step_counted(setting):
    after, metrics = setting.stepped(1)
    assert int(after.step) == 1 and bool(metrics.finite) and after.reference == {}
    for before, now in zip(jax.tree.leaves(setting.trees[1]), jax.tree.leaves(after.router_bias), strict=True):
        np.testing.assert_array_equal(before, now)


def test_on_policy_the_ratio_is_1_and_sampler_and_trainer_agree(setting):
    sums = setting.stepped(1)[1].sums
    tokens = sum(len(sample.response_ids_m) for at, sample in enumerate(setting.samples) if at != 2)
    assert float(sums.tokens) == float(sums.ratio) == tokens
    assert float(sums.mismatch) / tokens < 1e-5
    assert float(sums.clipped_low) == float(sums.clipped_high) == float(sums.importance_capped) == 0
    assert 0 < float(sums.entropy) / tokens < np.log(CAN_BE_DRAWN)


def test_trap_L10_the_mtp_loss_moves_the_mtp_modules_alone(setting):
    update, model = setting.packed(1), setting.skeleton

    def of_mtp(parameters, batch):
        def loss(parameters):
            live = put_together(model, parameters, setting.trees[1])
            hidden, _ = live.hidden_states(batch.tokens, batch.positions, batch.segment_ids)
            detached = put_together(model, module.without_trunk(parameters), setting.trees[1])
            return module.mtp_loss_sums(detached, jax.lax.stop_gradient(hidden), batch).sum()

        return jax.value_and_grad(loss)(parameters)

    arguments = setting.trees[0], update.batch
    value, found = quickly(jax.jit(of_mtp), *arguments)(*arguments)
    counts = np.asarray(module.mtp_targets(update.batch, 1)[1]).sum()
    assert counts == sum(len(sample.response_ids_m) for at, sample in enumerate(setting.samples) if at != 2) - sum(
        len(sample.prompt_ids_n) == 1 for at, sample in enumerate(setting.samples) if at != 2
    )
    assert float(value) / counts == pytest.approx(float(setting.stepped(1)[1].mtp_loss[0]), rel=1e-5)
    for name, tree in found.items():
        assert all(np.any(leaf) == (name == "mtp") for leaf in jax.tree.leaves(tree)), name


def test_a_step_that_is_not_finite_leaves_no_trace(setting):
    update = setting.packed(1)
    state = setting.state()
    state.parameters["head"] = state.parameters["head"].at[0, 0].set(np.nan)
    before = jax.tree.map(np.array, state)
    after, metrics = setting.step(1)(state, update.batch, update.used)
    assert not bool(metrics.finite)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)
