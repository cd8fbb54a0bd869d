"""The divergence from a teacher, and its gradient, against float64 numpy; and a whole step that learns from one."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs.tiny import config as tiny
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.convert.opening import OpenedModel
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.functional import abstract_trees, put_together, skeleton_of, to_run
from dsv3_jax.training import cross_entropy
from dsv3_jax.training.distillation import open_teacher, teacher_loss
from dsv3_jax.training.losses import Batch, TeacherModel, loss_sums
from sharding.mesh import on_mesh, one_device

COUNTED = np.array([1, 1, 0, 1, 0, 1, 1], bool)


def _inputs() -> list[np.ndarray]:
    """Student's hidden states and head, teacher's of another width."""
    random = np.random.default_rng(0)
    return [random.normal(size=shape).astype(np.float32) for shape in ((7, 5), (5, 11), (7, 3), (3, 11))]


def _divergence(hidden, head, teacher, teacher_head, temperature: float) -> float:
    """Every token's sum over the vocabulary, written out, in float64."""
    total = 0.0
    for place in np.flatnonzero(COUNTED):
        student, of_teacher = (
            np.exp(logits / temperature) / np.exp(logits / temperature).sum()
            for logits in (hidden[place] @ head, teacher[place] @ teacher_head)
        )
        total += sum(p * (np.log(p) - np.log(q)) for p, q in zip(of_teacher, student, strict=True))
    return temperature**2 * total


@pytest.mark.parametrize("tokens_at_once", [1024, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_gradients_are_those_of_numpy(temperature: float, tokens_at_once: int, monkeypatch):
    monkeypatch.setattr(cross_entropy, "TOKENS_AT_ONCE", tokens_at_once)
    inputs = _inputs()
    found, gradients = jax.value_and_grad(
        lambda *both: teacher_loss(*both, *inputs[2:], COUNTED, temperature), argnums=(0, 1)
    )(*map(jnp.asarray, inputs[:2]))
    exact = [array.astype(np.float64) for array in inputs]
    assert float(found) == pytest.approx(_divergence(*exact, temperature), rel=1e-5)
    for which, gradient in enumerate(gradients):
        expected = np.zeros_like(exact[which])
        for place in np.ndindex(expected.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [array.copy() for array in exact]
                moved[which][place] += step
                ends.append(_divergence(*moved, temperature))
            expected[place] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_teacher_that_says_the_same_leaves_nothing_to_learn():
    hidden, head, *_ = map(jnp.asarray, _inputs())
    loss, gradients = jax.value_and_grad(lambda *both: teacher_loss(*both, hidden, head, COUNTED, 2.0), argnums=(0, 1))(
        hidden, head
    )
    assert abs(float(loss)) < 1e-6 and max(float(jnp.abs(gradient).max()) for gradient in gradients) < 1e-6


def test_a_vocabulary_divided_over_devices_changes_nothing(mesh_with: Callable):
    hidden, head, teacher, teacher_head = _inputs()
    head, teacher_head = (np.concatenate([one, -one[:, :1]], axis=1) for one in (head, teacher_head))  # an even number
    both = jax.value_and_grad(teacher_loss, argnums=(0, 1))
    columns = PartitionSpec(None, "tensor")
    specs = (PartitionSpec(), columns, PartitionSpec(), columns)
    divided = on_mesh(
        lambda *arrays: both(*arrays, COUNTED, 2.0),
        mesh_with(tensor=2),
        specs,
        (PartitionSpec(), (PartitionSpec(), columns)),
    )
    found = jax.jit(divided)(hidden, head, teacher, teacher_head)
    expected = both(hidden, head, teacher, teacher_head, COUNTED, 2.0)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


SMALL = dataclasses.replace(
    tiny.model, vocabulary=280, width=16, layers=2, dense_ffn_width=16, heads=2, query_latent=8, key_value_latent=8,
    nope_head_dim=4, rope_head_dim=4, value_head_dim=4, experts=4, experts_per_token=2, expert_ffn_width=8,
    expert_groups=2, mtp_depth=1,
)  # fmt: skip
LARGER = dataclasses.replace(SMALL, width=24, heads=4, mtp_depth=0)
CONFIG = dataclasses.replace(
    tiny,
    model=SMALL,
    data=dataclasses.replace(tiny.data, kind="chats", path="task"),
    training=dataclasses.replace(tiny.training, tokens=4 * 12 * 100, batch_size=4, sequence_length=12),
    loss=dataclasses.replace(tiny.loss, teacher="teacher", teacher_weight=0.75, teacher_temperature=2.0),
)


def _batch() -> Batch:
    random, places = np.random.default_rng(1), np.tile(np.arange(13, dtype=np.int32), (4, 1))
    segments = np.array([[1] * 13, [1] * 6 + [2] * 7, [1] * 9 + [0] * 4, [0] * 13], np.int32)
    learnt = np.array([[0] * 5 + [1] * 8, [0] * 3 + [1] * 3 + [0] * 2 + [1] * 5, [0] * 6 + [1] * 3 + [0] * 4, [0] * 13])
    return Batch(random.integers(0, 280, (4, 13)).astype(np.int32), segments, places, learnt.astype(np.int32))


@pytest.fixture(scope="module")
def teacher_trees():
    random = np.random.default_rng(5)
    skeleton = to_run(skeleton_of(LARGER))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype),
                        abstract_trees(skeleton))  # fmt: skip


def test_the_teachers_part_of_the_loss_is_of_responses_alone(teacher_trees):
    skeleton, random = skeleton_of(SMALL), np.random.default_rng(3)
    trees = jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype),
                         abstract_trees(skeleton))  # fmt: skip
    batch = _batch()
    where = batch.positions[:, :-1], batch.segment_ids[:, :-1]

    @jax.jit
    def run(trees, teacher_trees):
        model, teacher = put_together(skeleton, *trees), put_together(to_run(skeleton_of(LARGER)), *teacher_trees)
        sums, _ = loss_sums(model, batch, isolate_documents=True, teacher=TeacherModel(teacher, 2.0))
        return sums, model(batch.tokens[:, :-1], *where), teacher(batch.tokens[:, :-1], *where)

    sums, *logits = run(trees, teacher_trees)
    student, teacher = (np.asarray(one, np.float64) / 2.0 for one in logits)
    expected, labels = 0.0, 0.0
    for row in range(4):
        for place in range(12):
            own = batch.segment_ids[row, place] == batch.segment_ids[row, place + 1] > 0
            if own and batch.learnt[row, place + 1]:
                of_teacher, of_student = (np.exp(one[row, place]) for one in (teacher, student))
                of_teacher, of_student = of_teacher / of_teacher.sum(), of_student / of_student.sum()
                expected += 4.0 * (of_teacher * np.log(of_teacher / of_student)).sum()
                plain = np.exp(2.0 * student[row, place])
                labels -= np.log(plain[batch.tokens[row, place + 1]] / plain.sum())
    assert float(sums.teacher) == pytest.approx(expected, rel=1e-5)
    assert float(sums.next_token) == pytest.approx(labels, rel=1e-5)


def _opened(tokenizer: str | None, vocabulary: int = 280) -> OpenedModel:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(LARGER, vocabulary=vocabulary))
    return OpenedModel("teacher", config, tokenizer, None, lambda: None, True)  # type: ignore[arg-type]


def _tokenizer(text: str) -> str:
    return train_tokenizer([text * 9], 280).to_str()


@pytest.mark.parametrize(
    ("theirs", "ours", "rows", "message"),
    [
        (
            _tokenizer("to be or"),
            _tokenizer("not to be"),
            280,
            "loss.teacher=teacher has another tokenizer than this run",
        ),
        (None, _tokenizer("to be"), 280, "loss.teacher=teacher has no tokenizer.json"),
        (_tokenizer("to be"), _tokenizer("to be"), 288, "loss.teacher=teacher has model.vocabulary=288, this run 280"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused(theirs: str | None, ours: str, rows: int, message: str):
    config: Config = CONFIG
    with pytest.raises(ConfigError, match=message) as caught:
        open_teacher(_opened(theirs, rows), config, ours, one_device())
    assert "\n" not in str(caught.value)
