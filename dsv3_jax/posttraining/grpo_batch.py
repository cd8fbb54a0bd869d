"""Responses of one update as rows of a fixed shape: several to a row, isolated from each other (R1 appendix B.1).

Which positions count comes from lengths alone. A token id says nothing: the end token of a response is one that is
learned, and in many tokenizers the same as padding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.posttraining.grpo_loss import TokenValues


class Sample(NamedTuple):
    """One response, as numpy arrays: n prompt tokens and m response tokens."""

    prompt_ids_n: np.ndarray
    response_ids_m: np.ndarray
    logprobs_m: np.ndarray
    """float32, of the sampler."""
    experts_SLK: np.ndarray
    """Integers [n + m - 1, L, K]: where the sampler sent every token that it read."""

    @property
    def positions(self) -> int:
        """Tokens that the model reads: the last one is only predicted."""
        return len(self.prompt_ids_n) + len(self.response_ids_m) - 1


class GRPOBatch(NamedTuple):
    """Rows of one update; int32 [B, S] unless said otherwise. Rows without anything are the last of every device's."""

    tokens: Any
    labels: Any
    """The token after each."""
    segment_ids: Any
    """From 1 within a row; 0 is padding."""
    positions: Any
    experts: Any
    """uint16 [B, S, L, K]: the routing to be replayed; of padding any."""
    values: TokenValues


class Place(NamedTuple):
    """Where a response's tokens are predicted: positions start .. stop - 1 of a row."""

    row: int
    start: int
    stop: int


class Packed(NamedTuple):
    batch: GRPOBatch
    places: list[Place]
    """Of the samples, in their order."""
    used: np.int32
    """Microbatches with anything in them."""

    def with_values(self, **of_samples: Sequence[float] | np.ndarray) -> "Packed":
        """With the same number at every token of each response, for fields of TokenValues."""
        columns = {}
        for name, values in of_samples.items():
            column = np.zeros_like(getattr(self.batch.values, name))
            for (row, start, stop), value in zip(self.places, values, strict=True):
                column[row, start:stop] = value
            columns[name] = column
        return self._replace(batch=self.batch._replace(values=self.batch.values._replace(**columns)))

    def with_scores(self, old_logprobs: np.ndarray, reference_logprobs: np.ndarray) -> "Packed":
        """With what the trainer's policy and the reference say of every token, [B, S]."""
        values = self.batch.values._replace(old_logprobs=old_logprobs, reference_logprobs=reference_logprobs)
        return self._replace(batch=self.batch._replace(values=values))


def packed(samples: Sequence[Sample], rows: int, length: int, microbatches: int, shards: int) -> Packed:
    """The samples in `rows` rows, each into the fullest that has room for it, the longest first.

    Rows are dealt to the `shards` parts that devices divide them into, so that all have as many, and the filled ones
    are in the first microbatches. `rows` is a multiple of both numbers, at least as many as samples, and no sample
    longer than `length`.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(samples)), key=lambda index: -samples[index].positions):
        size = samples[index].positions
        fitting = [bin_ for bin_, left in enumerate(room) if left >= size]
        if fitting:
            chosen = min(fitting, key=room.__getitem__)
        else:
            chosen = len(bins)
            bins.append([])
            room.append(length)
        bins[chosen].append(index)
        room[chosen] -= size
    of_shard = rows // shards
    batch, places = _empty(samples[0], rows, length), [Place(0, 0, 0)] * len(samples)
    for number, indices in enumerate(bins):
        row, start = number % shards * of_shard + number // shards, 0
        for segment, index in enumerate(indices, start=1):
            places[index] = _put(batch, samples[index], row, start, segment)
            start += samples[index].positions
    filled = -(-len(bins) // shards)
    return Packed(batch, places, np.int32(-(-filled // (of_shard // microbatches))))


def _empty(like: Sample, rows: int, length: int) -> GRPOBatch:
    def numbers(dtype: type) -> np.ndarray:
        return np.zeros((rows, length), dtype)

    layers, chosen = like.experts_SLK.shape[1:]
    experts = np.broadcast_to(np.arange(chosen, dtype=np.uint16), (rows, length, layers, chosen)).copy()
    of_tokens = TokenValues(numbers(bool), *(numbers(np.float32) for _ in TokenValues._fields[1:]))
    tokens, labels, segment_ids, positions = (numbers(np.int32) for _ in range(4))
    return GRPOBatch(tokens, labels, segment_ids, positions, experts, of_tokens)


def _put(batch: GRPOBatch, sample: Sample, row: int, start: int, segment: int) -> Place:
    whole, size = np.concatenate([sample.prompt_ids_n, sample.response_ids_m]), sample.positions
    here = row, slice(start, start + size)
    batch.tokens[here], batch.labels[here] = whole[:-1], whole[1:]
    batch.segment_ids[here], batch.positions[here] = segment, np.arange(size)
    batch.experts[here] = sample.experts_SLK
    place = Place(row, start + len(sample.prompt_ids_n) - 1, start + size)
    response = row, slice(place.start, place.stop)
    batch.values.counted[response] = True
    batch.values.sampler_logprobs[response] = sample.logprobs_m
    return place
