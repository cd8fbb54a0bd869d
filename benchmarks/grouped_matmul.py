"""The grouped matmul's cost follows its rows, whatever the number of experts.

python -m benchmarks.grouped_matmul

Times forward and gradient of 8192 rows of 256 x 256 over more and more experts, as a ratio to one dense product of the
same rows; jax.lax.ragged_dot beside it.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.interleaved import interleaved, ratio
from dsv3_jax.kernels.grouped_matmul import grouped_matmul

ROWS, WIDTH, ROUNDS = 8192, 256, 5


def timed(function: Callable, *arguments: jax.Array) -> Callable[[], float]:
    gradient = jax.jit(jax.grad(lambda *operands: jnp.sum(function(*operands) ** 2), argnums=(0, 1)))
    compiled = gradient.lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))

    def measure() -> float:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    return measure


def main() -> None:
    random = np.random.default_rng(0)
    rows = jnp.asarray(random.standard_normal((ROWS, WIDTH)), jnp.float32)
    dense = timed(lambda x, w: x @ w, rows, jnp.asarray(random.standard_normal((WIDTH, WIDTH)), jnp.float32))
    for experts in (1, 4, 16, 64, 256):
        weights = jnp.asarray(random.standard_normal((experts, WIDTH, WIDTH)), jnp.float32)
        sizes = jnp.asarray(np.bincount(random.integers(0, experts, ROWS), minlength=experts), jnp.int32)
        sides = {"dense": dense, "grouped": timed(grouped_matmul, rows, weights, sizes)}
        if experts <= 64:
            sides["ragged"] = timed(jax.lax.ragged_dot, rows, weights, sizes)
        found = interleaved(sides, ROUNDS)
        line = f"{experts:4d} experts: grouped / dense {ratio(found['grouped'], found['dense'])}"
        if "ragged" in found:
            line += f"; ragged_dot / dense {ratio(found['ragged'], found['dense'])}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
