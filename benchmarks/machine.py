"""What this machine does at most, measured: what bounds are made of."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

REPEATED = 10


class MachineRates(NamedTuple):
    products: float
    """Floating-point operations a second of one large float32 product."""
    reads: float
    """Bytes a second of one sum over a large array."""


def machine_rates() -> MachineRates:
    square, column = jnp.ones((2048, 2048)), jnp.ones(64 * 2**20)
    product, total = jax.jit(lambda x: x @ x), jax.jit(jnp.sum)
    return MachineRates(
        2 * 2048**3 / fastest(lambda: product(square)),
        column.nbytes / fastest(lambda: total(column)),
    )


def fastest(work: Callable[[], jax.Array]) -> float:
    """Seconds of the best of ten calls."""
    times = []
    for _ in range(REPEATED):
        start = time.perf_counter()
        work().block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)
