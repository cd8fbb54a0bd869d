"""Validation: every held-out token once, whatever the batches, and its bits per byte."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import config as tiny
from dsv3_jax.model.functional import abstract_trees, put_together, skeleton_of
from dsv3_jax.training.evaluation import Evaluation, make_evaluate
from sharding.mesh import one_device

MODEL = dataclasses.replace(
    tiny.model, vocabulary=50, width=16, layers=1, dense_layers=0, heads=2, query_latent=8, key_value_latent=8,
    nope_head_dim=4, rope_head_dim=4, value_head_dim=4, experts=4, experts_per_token=2, expert_ffn_width=8,
    expert_groups=2, mtp_depth=1,
)  # fmt: skip
CONFIG = dataclasses.replace(tiny, model=MODEL, data=dataclasses.replace(tiny.data, isolate_documents=True))
SKELETON = skeleton_of(MODEL)
EVALUATE = make_evaluate(CONFIG, SKELETON, one_device())


@pytest.fixture(scope="module")
def trees():
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.float32(0.3 * random.normal(size=leaf.shape)), abstract_trees(SKELETON))


def _rows() -> dict[str, np.ndarray]:
    """Four rows of documents and padding."""
    segments = np.array([[1] * 9, [1] * 4 + [2] * 5, [1] * 2 + [2] * 3 + [0] * 4, [0] * 9], np.int32)
    return {
        "tokens": np.random.default_rng(1).integers(0, 50, (4, 9)).astype(np.int32),
        "segment_ids": segments,
        "positions": np.tile(np.arange(9, dtype=np.int32), (4, 1)),
    }


def _slices(rows: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    return [{name: array[start : start + size] for name, array in rows.items()} for start in range(0, 4, size)]


def test_nats_are_those_of_the_models_own_logits(trees):
    rows = _rows()
    model = jax.jit(lambda trees, *inputs: put_together(SKELETON, *trees)(*inputs))
    logits = model(trees, rows["tokens"][:, :-1], rows["positions"][:, :-1], rows["segment_ids"][:, :-1])
    logits = np.asarray(logits, np.float64)
    nats, tokens = 0.0, 0
    for row, place in np.ndindex(4, 8):
        if rows["segment_ids"][row, place] == rows["segment_ids"][row, place + 1] != 0:
            label = rows["tokens"][row, place + 1]
            nats += np.log(np.exp(logits[row, place]).sum()) - logits[row, place, label]
            tokens += 1
    found = EVALUATE(*trees, _slices(rows, 4))
    assert found.tokens == tokens == 8 + (3 + 4) + (1 + 2)
    assert found.nats == pytest.approx(nats, rel=1e-5)


def test_the_split_into_batches_changes_nothing(trees):
    whole, halves = EVALUATE(*trees, _slices(_rows(), 4)), EVALUATE(*trees, iter(_slices(_rows(), 2)))
    assert whole.tokens == halves.tokens
    assert whole.nats == pytest.approx(halves.nats, rel=1e-6)


def test_what_padding_holds_changes_nothing_and_nor_do_parameters(trees):
    before = jax.tree.map(np.array, trees)
    rows = _rows()
    first = EVALUATE(*trees, _slices(rows, 4))
    rows["tokens"] = np.where(rows["segment_ids"] > 0, rows["tokens"], 7)
    assert EVALUATE(*trees, _slices(rows, 4)) == first
    jax.tree.map(np.testing.assert_array_equal, trees, before)


def test_no_batches_are_no_tokens(trees):
    assert EVALUATE(*trees, []) == Evaluation(0, 0)
    assert Evaluation(0.0, 0).loss == 0


def test_bits_per_byte_counts_the_text_and_not_the_tokens():
    evaluation = Evaluation(nats=30 * math.log(2), tokens=10)
    assert evaluation.bits_per_byte(20) == pytest.approx(1.5)
    assert evaluation.loss == pytest.approx(3 * math.log(2))
    # A model that knows nothing of 256 equal bytes spends 8 bits on each.
    assert Evaluation(1000 * math.log(256), 1000).bits_per_byte(1000) == pytest.approx(8)
