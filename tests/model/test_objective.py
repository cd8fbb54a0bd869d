"""The whole objective and its gradients against central differences of the same objective in float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.functional import put_together, skeleton_of
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.training.losses import Batch, LossWeights, loss_counts, loss_sums, mean_losses, objective
from tests.reference import transformer as reference
from tests.reference.weights import Tree, random_weights

MTP_WEIGHT, BALANCE_WEIGHT = 0.7, 0.5
# Of the central differences: so small that no token changes its experts on the way.
STEP = 1e-7
CHANGES = {
    "v3": {"layers": 2, "mtp_depth": 1},
    "v2": {
        "layers": 1,
        "dense_layers": 0,
        "mtp_depth": 2,
        "mtp_input": "residual",
        "score_function": "softmax",
        "group_score": "max",
        "selection_bias": False,
        "normalize_weights": False,
        "query_latent": None,
    },
}


class Case:
    """A model, its weights and tokens, its objective and the gradients of it in both weight trees."""

    def __init__(self, model: ModelConfig):
        self.model = model
        self.weights = random_weights(model)
        self.tokens = np.random.default_rng(4).integers(0, model.vocabulary - 8, (2, 8)).astype(np.int32)
        tokens = jnp.asarray(self.tokens)
        batch = Batch(tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), tokens.shape))
        skeleton, counts = skeleton_of(model), loss_counts(batch, model.mtp_depth)

        def total(parameters: Tree, router_bias: Tree, weights: LossWeights):
            sums, _ = loss_sums(put_together(skeleton, parameters, router_bias), batch, isolate_documents=False)
            means = mean_losses(sums, counts, model)
            return objective(means, weights, model), means

        self._compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (self.value, self.means), (self.gradients, self.bias_gradients) = self.ours(MTP_WEIGHT, BALANCE_WEIGHT)

    def ours(self, mtp_weight: float, balance_weight: float):
        return self._compiled(*self.weights, LossWeights(jnp.float32(mtp_weight), jnp.float32(balance_weight)))

    def reference(self, parameters: Tree) -> float:
        rows = list(self.tokens)
        return reference.objective(rows, parameters, self.weights[1], self.model, MTP_WEIGHT, BALANCE_WEIGHT)


@pytest.fixture(scope="module", params=CHANGES)
def case(request, tiny_model) -> Case:
    return Case(tiny_model(**CHANGES[request.param]))


def test_the_objective_is_that_of_the_equations(case):
    parameters = jax.tree.map(lambda leaf: leaf.astype(np.float64), case.weights[0])
    assert float(case.value) == pytest.approx(case.reference(parameters), rel=1e-5)


def test_every_gradient_is_the_slope_of_the_objective(case):
    """One random direction a parameter, so that each is checked by itself."""
    generator = np.random.default_rng(0)
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), case.weights[0])
    gradients = jax.tree_util.tree_flatten_with_path(case.gradients)[0]
    for index, (path, gradient) in enumerate(gradients):
        direction = generator.standard_normal(gradient.shape)
        # Towards the gradient, so that the slope is not small beside the rounding of the gradient itself.
        direction += 3.0 * np.asarray(gradient) / np.sqrt(np.mean(np.square(np.asarray(gradient))))
        slopes = [case.reference(_moved(exact, index, sign * STEP * direction)) for sign in (1, -1)]
        slope = (slopes[0] - slopes[1]) / (2 * STEP)
        found = float(np.sum(direction * np.asarray(gradient, np.float64)))
        assert found == pytest.approx(slope, rel=2e-4), jax.tree_util.keystr(path)


@pytest.mark.parametrize("remat", ["up_projections", "block"])
@pytest.mark.parametrize("case", ["v3"], indirect=True)
def test_trap_R12_recomputing_blocks_changes_neither_loss_nor_gradients(case, remat):
    recomputed = Case(dataclasses.replace(case.model, remat=remat))
    assert float(recomputed.value) == pytest.approx(float(case.value), rel=1e-6)
    for ours, plain in zip(jax.tree.leaves(recomputed.gradients), jax.tree.leaves(case.gradients), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-6 * np.abs(np.asarray(plain)).max())


def test_trap_B6_no_gradient_reaches_the_selection_bias(case):
    for gradient in jax.tree.leaves(case.bias_gradients):
        np.testing.assert_array_equal(gradient, 0.0)
    names = {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(case.weights[0])[0]}
    assert "bias" not in names


def test_trap_T8_the_mtp_loss_counts_and_reaches_embedding_head_and_trunk(case):
    assert (np.asarray(case.means.mtp) > 1.0).all()
    _, (without, _) = case.ours(0.0, BALANCE_WEIGHT)
    difference = jax.tree.map(lambda left, right: np.abs(np.asarray(left - right)).max(), case.gradients, without)
    for name in ("embedding", "head"):
        assert difference[name] > 1e-3
    assert min(jax.tree.leaves(difference["moe_blocks"]["attention"])) > 1e-4
    for gradient in jax.tree.leaves([module["projection"] for module in without["mtp"].values()]):
        # Without the MTP loss only the balance of the modules' own routers moves them.
        assert 0.0 < np.abs(np.asarray(gradient)).max() < 0.1


def test_balance_moves_nothing_after_the_last_router(case):
    _, (without, _) = case.ours(MTP_WEIGHT, 0.0)
    difference = jax.tree.map(lambda left, right: np.abs(np.asarray(left - right)).max(), case.gradients, without)
    assert difference["head"] == 0.0
    last = difference["mtp"][case.model.mtp_depth - 1]
    assert max(jax.tree.leaves(last["block"]["feed_forward"]["experts"])) == 0.0
    assert last["block"]["feed_forward"]["router"]["weight"] > 1e-4


def test_embeddings_of_unused_ids_get_no_gradient(case):
    unused = np.setdiff1d(np.arange(case.model.vocabulary), case.tokens)
    np.testing.assert_array_equal(np.asarray(case.gradients["embedding"])[unused], 0.0)
    assert np.abs(np.asarray(case.gradients["head"])[:, unused]).min() > 0.0


def _moved(parameters: Tree, index: int, by: np.ndarray) -> Tree:
    """The tree with its index-th leaf moved."""
    leaves, treedef = jax.tree.flatten(parameters)
    leaves[index] = leaves[index] + by
    return jax.tree.unflatten(treedef, leaves)
