"""Training speed against two baselines: the matmul rate of jax itself, and transformers.

python -m benchmarks.training_speed CONFIG [--matmul-only]

CONFIG names a file in configs/. Prints two ratios, each the median and range of interleaved rounds:
  1. FLOP/s of our step (by formula, see dsv3_jax/training/flops.py) over the rate that bare jitted matmuls of the
     model's own shapes reach;
  2. our tokens/s, without MTP, over those of the fastest transformers variant, and the most that ratio could be if our
     step were nothing but its matmuls.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

from dsv3_jax.runtime import set_up_compiler, use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import jax
import numpy as np

from benchmarks.interleaved import interleaved, ratio
from dsv3_jax.command_line import load_config
from dsv3_jax.config import Config
from dsv3_jax.model.functional import skeleton_of
from dsv3_jax.training.flops import measured_matmul_rate, model_flops_per_token
from dsv3_jax.training.losses import Batch
from dsv3_jax.training.state import initial_state
from dsv3_jax.training.step import compile_train_step
from sharding.mesh import one_device

ROUNDS, STEPS = 5, 4


def trainer(config: Config) -> Callable[[], float]:
    """A function that makes STEPS training steps on random tokens and returns the median step's tokens/s."""
    skeleton, training = skeleton_of(config.model), config.training
    mesh = one_device()
    step = compile_train_step(config, skeleton, mesh)
    state = [initial_state(config, skeleton, mesh)]
    random = np.random.default_rng(0)
    shape = (training.batch_size, training.sequence_length + 1)
    ones, places = np.ones(shape, np.int32), np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)

    def train() -> float:
        seconds = []
        for _ in range(STEPS):
            tokens = random.integers(0, config.model.vocabulary, shape, np.int32)
            start = time.perf_counter()
            state[0], metrics = step(state[0], Batch(tokens, ones, places))
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
        return training.batch_size * training.sequence_length / statistics.median(seconds)

    train()
    return train


def main() -> None:
    set_up_compiler()
    name, *rest = sys.argv[1:]
    config = load_config(name)
    rows = config.training.batch_size // config.training.microbatches * config.training.sequence_length
    flops = model_flops_per_token(config.model, config.training.sequence_length)
    found = interleaved({"step": trainer(config), "matmul": lambda: measured_matmul_rate(config.model, rows)}, ROUNDS)
    speeds, rates = found["step"], found["matmul"]
    print(
        f"{name}: {statistics.median(speeds):,.0f} tokens/s, {flops / 1e6:.1f} MFLOP a token; "
        f"bare matmuls {statistics.median(rates) / 1e9:,.0f} GFLOP/s"
    )
    print(f"step / matmul rate: {ratio([speed * flops for speed in speeds], rates)}", flush=True)
    if "--matmul-only" not in rest:
        against_transformers(config)


def against_transformers(config: Config) -> None:
    from benchmarks import transformers_baseline as baseline

    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mtp_depth=0))
    shape = config.training.batch_size, config.training.sequence_length
    _, implementation, precision = baseline.fastest(lambda net: baseline.training_rate(net, *shape), config.model)
    theirs = baseline.trainer(baseline.build(config.model, implementation, precision), *shape)
    theirs(2)
    flops = model_flops_per_token(config.model, config.training.sequence_length)
    sides = {
        "ours": trainer(config),
        "theirs": lambda: theirs(STEPS),
        "matmul": lambda: measured_matmul_rate(config.model, shape[0] * shape[1]) / flops,
    }
    found = interleaved(sides, ROUNDS)
    print(
        f"without MTP: ours {statistics.median(found['ours']):,.0f} tokens/s, "
        f"transformers ({implementation}, {precision}) {statistics.median(found['theirs']):,.0f}"
    )
    print(
        f"ours / transformers: {ratio(found['ours'], found['theirs'])}; "
        f"bare matmuls / transformers: {ratio(found['matmul'], found['theirs'])}"
    )


if __name__ == "__main__":
    main()
