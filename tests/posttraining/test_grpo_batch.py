"""Packing: every response once, whole, isolated; what counts is known from lengths alone."""

import numpy as np
import pytest

from dsv3_jax.posttraining.grpo_batch import Packed, Sample, packed

ROWS, LENGTH = 16, 20


def samples(count: int = 13) -> list[Sample]:
    random = np.random.default_rng(0)

    def one() -> Sample:
        prompt, response = random.integers(1, 9), random.integers(1, 13)
        ids = random.integers(0, 50, prompt + response).astype(np.int32)
        ids[-1] = ids[0] = 0  # the end token, which is also that of padding
        logprobs = -random.random(response).astype(np.float32) - 0.1
        experts = random.integers(0, 8, (prompt + response - 1, 2, 3)).astype(np.uint16)
        return Sample(ids[:prompt], ids[prompt:], logprobs, experts)

    return [one() for _ in range(count)]


@pytest.mark.parametrize(("microbatches", "shards"), [(1, 1), (4, 1), (8, 2), (2, 8)])
def test_every_response_is_in_one_row_whole(microbatches, shards):
    given = samples()
    result = packed(given, ROWS, LENGTH, microbatches, shards)
    batch, seen = result.batch, np.zeros((ROWS, LENGTH), int)
    for sample, place in zip(given, result.places, strict=True):
        first, prompt = place.stop - sample.positions, len(sample.prompt_ids_n)
        here = place.row, slice(first, place.stop)
        whole = np.concatenate([sample.prompt_ids_n, sample.response_ids_m])
        np.testing.assert_array_equal(batch.tokens[here], whole[:-1])
        np.testing.assert_array_equal(batch.labels[here], whole[1:])
        np.testing.assert_array_equal(batch.positions[here], np.arange(sample.positions))
        np.testing.assert_array_equal(batch.experts[here], sample.experts_SLK)
        assert len(set(batch.segment_ids[here])) == 1 and batch.segment_ids[here][0] > 0
        np.testing.assert_array_equal(batch.values.counted[here], np.arange(sample.positions) >= prompt - 1)
        np.testing.assert_array_equal(
            batch.values.sampler_logprobs[place.row, place.start : place.stop], sample.logprobs_m
        )
        seen[here] += 1
    assert seen.max() == 1
    np.testing.assert_array_equal(seen > 0, batch.segment_ids > 0)
    assert not batch.values.counted[seen == 0].any()


def test_trap_L5_a_response_of_end_tokens_counts_as_any_other():
    """The id of padding and of the end, wherever it stands, says nothing."""
    zeros = np.zeros(6, np.int32)
    sample = Sample(zeros[:2], zeros[2:], np.full(4, -1.0, np.float32), np.zeros((5, 1, 1), np.uint16))
    batch = packed([sample], 1, 8, 1, 1).batch
    np.testing.assert_array_equal(batch.values.counted, [[False, True, True, True, True, False, False, False]])
    np.testing.assert_array_equal(batch.segment_ids, [[1] * 5 + [0] * 3])


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_rows_are_dealt_to_devices_evenly_and_come_first(shards):
    result = packed(samples(), ROWS, LENGTH, 4, shards)
    filled = result.batch.segment_ids.any(axis=1).reshape(shards, 4, -1)  # device, microbatch, rows
    of_device = filled.reshape(shards, -1).sum(axis=1)
    assert of_device.max() - of_device.min() <= 1
    assert result.used == filled.any(axis=(0, 2)).sum()
    assert filled.any(axis=(0, 2))[: result.used].all()


def test_packing_saves_rows():
    given = samples(16)
    assert packed(given, ROWS, LENGTH, ROWS, 1).used <= -(-sum(one.positions for one in given) // LENGTH) + 1


def test_values_of_responses_go_to_their_own_tokens():
    given = samples()
    result: Packed = packed(given, ROWS, LENGTH, 4, 2)
    judged = np.arange(len(given)) != 3
    result = result.with_values(advantages=np.arange(13.0), counted=judged)
    for index, (row, start, stop) in enumerate(result.places):
        np.testing.assert_array_equal(result.batch.values.advantages[row, start:stop], index)
        assert result.batch.values.counted[row, start:stop].all() == judged[index]
    assert result.batch.values.counted.sum() == sum(
        len(one.response_ids_m) for one, ok in zip(given, judged, strict=True) if ok
    )
