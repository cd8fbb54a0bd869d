"""The update of a step against AdamW as published (Loshchilov and Hutter, algorithm 2) in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import config as tiny
from dsv3_jax.model.functional import abstract_trees, skeleton_of
from dsv3_jax.training import step as step_module
from dsv3_jax.training.losses import Batch, Losses
from dsv3_jax.training.state import TrainState, abstract_state
from dsv3_jax.training.step import make_train_step
from sharding.mesh import one_device

MODEL = dataclasses.replace(
    tiny.model, vocabulary=20, width=8, layers=3, dense_ffn_width=8, heads=2, query_latent=4, key_value_latent=4,
    nope_head_dim=4, rope_head_dim=2, value_head_dim=4, experts=4, experts_per_token=2, expert_ffn_width=4,
    expert_groups=2,
)  # fmt: skip
CONFIG = dataclasses.replace(
    tiny, model=MODEL, optimizer=dataclasses.replace(tiny.optimizer, learning_rate=0.03, warmup_steps=4)
)
SKELETON = skeleton_of(MODEL)


def _draw(seed: int, size: float) -> Any:
    random = np.random.default_rng(seed)
    parameters, _ = abstract_trees(SKELETON)
    return jax.tree.map(lambda leaf: (size * random.normal(size=leaf.shape)).astype(np.float32), parameters)


def _named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf, np.float64) for path, leaf in leaves
    }


def _global_norm(gradients: Any) -> float:
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in _named(gradients).values())))


PARAMETERS = _draw(0, 0.5)
GRADIENTS = [*(_draw(t, size) for t, size in enumerate((1e-3, 1e-3, 1e-3, 1.0, 10.0, 1e-4), start=1)), _draw(0, 0.0)]


@pytest.fixture(scope="module")
def train() -> Callable[[list[int]], tuple[Any, list[float]]]:
    """Parameters, and the gradient norms reported, after one step for each of the GRADIENTS listed."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADIENTS)

    def given(_: TrainState, batch: Batch, *__: Any) -> tuple[Losses, list[jax.Array], Any]:
        gradients = jax.tree.map(lambda leaf: leaf[batch.tokens[0, 0]], stacked)
        return Losses(jnp.zeros(()), jnp.zeros(1), jnp.zeros(())), [], gradients

    abstract = abstract_state(CONFIG, SKELETON, one_device())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "accumulated_gradients", given)
        lowered = make_train_step(CONFIG, SKELETON, one_device()).lower(
            abstract, Batch(*[jnp.ones((1, 5), jnp.int32)] * 3)
        )
    train_step = lowered.compile()

    def train(indices: list[int]) -> tuple[Any, list[float]]:
        state, norms = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract), []
        state = state._replace(parameters=jax.tree.map(jnp.array, PARAMETERS))
        for index in indices:
            state, metrics = train_step(state, Batch(*[jnp.full((1, 5), index, jnp.int32)] * 3))
            norms.append(float(metrics.gradient_norm))
        return state.parameters, norms

    return train


class PaperAdamW:
    """Decay for everything that is not a norm's gain."""

    def __init__(self, parameters: Any):
        self.parameters = _named(parameters)
        self._m = {name: np.zeros_like(leaf) for name, leaf in self.parameters.items()}
        self._v = {name: np.zeros_like(leaf) for name, leaf in self.parameters.items()}

    def step(self, gradients: Any, t: int, rate: float) -> None:
        clip = min(1.0, 1.0 / _global_norm(gradients))
        for name, gradient in _named(gradients).items():
            gradient = clip * gradient
            self._m[name] = 0.9 * self._m[name] + 0.1 * gradient
            self._v[name] = 0.95 * self._v[name] + 0.05 * gradient**2
            m, v = self._m[name] / (1 - 0.9**t), self._v[name] / (1 - 0.95**t)
            decay = 0.0 if name.endswith("gain") else 0.1 * self.parameters[name]
            self.parameters[name] = self.parameters[name] - rate * (m / (np.sqrt(v) + 1e-8) + decay)


@pytest.mark.parametrize(
    ("indices", "clipped"),
    [([0, 1, 2], [False] * 3), ([3, 4, 5], [True, True, False])],
    ids=["never clipped", "clipped twice"],
)
def test_three_steps_follow_the_paper(indices, clipped, train):
    found, norms = train(indices)
    oracle = PaperAdamW(PARAMETERS)
    for t, index in enumerate(indices, start=1):
        oracle.step(GRADIENTS[index], t, rate=0.03 * t / 4)
    for name, leaf in _named(found).items():
        np.testing.assert_allclose(leaf, oracle.parameters[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert norms == pytest.approx([_global_norm(GRADIENTS[index]) for index in indices], rel=1e-5)
    assert [norm > 1 for norm in norms] == clipped


def test_without_a_gradient_matrices_shrink_and_gains_stay(train):
    after, _ = train([6])
    before = _named(PARAMETERS)
    gains = [name for name in before if name.endswith("gain")]
    # Attention, feed-forward and two latent norms of both stacks and the MTP block; the final norm; three of MTP.
    assert len(gains) == 3 * 4 + 1 + 3
    for name, leaf in _named(after).items():
        kept = 1.0 if name in gains else 1 - 0.03 / 4 * 0.1
        np.testing.assert_allclose(leaf, kept * before[name], rtol=1e-6, err_msg=name)
