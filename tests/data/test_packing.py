import json

import grain
import numpy as np
import pytest

from dsv3_jax.data.packing import PackedRows, overlapping_rows, segments_and_positions

# Exact fits, a document of one token, and one of several rows.
LENGTHS = (12, 4, 4, 1, 40, 7, 12, 24, 3, 5)


def numbered() -> list[np.ndarray]:
    """Documents whose tokens are all different."""
    return np.split(np.arange(sum(LENGTHS), dtype=np.int32), np.cumsum(LENGTHS)[:-1])


def packed(row_length: int) -> PackedRows:
    return PackedRows(grain.MapDataset.source(numbered()).repeat().to_iter_dataset(), row_length)


@pytest.mark.parametrize("row_length", [1, 4, 7, 12, 200])
def test_packing_keeps_every_token_in_order(row_length: int) -> None:
    iterator = iter(packed(row_length))
    rows = [next(iterator) for _ in range(250 // row_length + 1)]
    assert all(row.shape == (row_length,) and row.dtype == np.int32 for row in rows)
    stream = np.concatenate(rows)
    np.testing.assert_array_equal(stream, np.arange(len(stream)) % sum(LENGTHS))


@pytest.mark.parametrize("row_length", [1, 4, 7, 12, 200])
def test_resumes_exactly_from_every_position_through_json(row_length: int) -> None:
    iterator = iter(packed(row_length))
    states, rows = [], []
    for _ in range(30):
        states.append(json.dumps(iterator.get_state()))
        rows.append(next(iterator))
    resumed = iter(packed(row_length))
    for position, state in enumerate(states):
        # The same iterator over and over: it must forget where it was.
        resumed.set_state(json.loads(state))
        assert json.dumps(resumed.get_state()) == state
        for row in rows[position : position + 4]:
            np.testing.assert_array_equal(next(resumed), row)


@pytest.mark.parametrize("row_length", [2, 3, 5, 12, 113, 1000])
def test_overlapping_rows_pair_every_token_with_its_successor_once(row_length: int) -> None:
    rows = list(overlapping_rows(numbered(), row_length))
    assert all(len(row) == row_length for row in rows[:-1])
    assert 2 <= len(rows[-1]) <= row_length
    pairs = [pair for row in rows for pair in zip(row[:-1].tolist(), row[1:].tolist(), strict=True)]
    assert pairs == [(token, token + 1) for token in range(sum(LENGTHS) - 1)]


def test_nothing_to_predict_gives_no_rows() -> None:
    assert list(overlapping_rows([], 4)) == []
    assert list(overlapping_rows([np.array([7], np.int32)], 4)) == []


def slow_segments_and_positions(row: list[int], end: int) -> tuple[list[int], list[int]]:
    segments, positions, segment, position = [], [], 1, 0
    for token in row:
        segments.append(segment)
        positions.append(position)
        position += 1
        if token == end:
            segment, position = segment + 1, 0
    return segments, positions


def test_isolated_segments_and_positions_against_a_loop() -> None:
    tokens_BS = np.random.default_rng(0).choice([1, 1, 5, 6, 7, 8], size=(50, 23)).astype(np.int32)
    segment_ids_BS, positions_BS = segments_and_positions(tokens_BS, end=1, isolate=True)
    assert segment_ids_BS.dtype == positions_BS.dtype == np.int32
    for tokens, segments, positions in zip(tokens_BS, segment_ids_BS, positions_BS, strict=True):
        assert (segments.tolist(), positions.tolist()) == slow_segments_and_positions(tokens.tolist(), 1)


def test_without_isolation_a_row_is_one_segment() -> None:
    segment_ids_BS, positions_BS = segments_and_positions(np.ones((2, 4), np.int32), end=1, isolate=False)
    assert segment_ids_BS.tolist() == [[1, 1, 1, 1]] * 2
    assert positions_BS.tolist() == [[0, 1, 2, 3]] * 2
