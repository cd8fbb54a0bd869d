"""Tokens a second of training in FP8, where it may be emulated, against float32 and bfloat16.

python -m benchmarks.float8_speed [ROUNDS, by default 3]

The training step of `--config=tiny`, compiled for each, on one device and one batch; STEPS of each in turns.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.interleaved import interleaved, ratio
from configs.tiny import config as tiny
from dsv3_jax.command_line import run_main
from dsv3_jax.model.functional import skeleton_of
from dsv3_jax.runtime import set_up_compiler
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.state import initial_state
from dsv3_jax.training.step import compile_train_step
from sharding.mesh import one_device

STEPS = 5


def main() -> None:
    set_up_compiler()
    sides = {precision: rate_of(precision) for precision in ("float32", "bfloat16", "fp8")}
    found = interleaved(sides, int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    for name, rates in found.items():
        print(f"{name:<9} {statistics.median(rates):>7,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f})")
    for name in ("float32", "bfloat16"):
        print(f"{name} / fp8: {ratio(found[name], found['fp8'])}")


def rate_of(precision: str) -> Callable[[], float]:
    """Of one call: tokens a second over the next steps of a run that goes on from call to call."""
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, precision=precision))
    skeleton, mesh = skeleton_of(config.model), one_device()
    step, state = compile_train_step(config, skeleton, mesh), initial_state(config, skeleton, mesh)
    shape = config.training.batch_size, config.training.sequence_length + 1
    tokens = np.random.default_rng(0).integers(0, config.model.vocabulary, shape).astype(np.int32)
    places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = Batch(*(jax.device_put(rows) for rows in (tokens, np.ones_like(tokens), places)))

    def rate() -> float:
        nonlocal state
        jax.block_until_ready(state)
        begin = time.perf_counter()
        for _ in range(STEPS):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        return STEPS * config.training.batch_size * config.training.sequence_length / (time.perf_counter() - begin)

    rate()
    return rate


if __name__ == "__main__":
    run_main(main)
