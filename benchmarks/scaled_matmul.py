"""Products of FP8 against the grouped matmul in bfloat16, at the shapes of V3's experts.

python -m benchmarks.scaled_matmul [ROUNDS, by default 5]

For devices that multiply FP8, such as an H200 or a tpu7x. For each product of both layers of an expert: TFLOP/s, and
the ratio to the grouped matmul in bfloat16 and to one dense product in bfloat16 of the same rows, the most that a
grouped one could reach. Codes are made beforehand; what quantising costs is part of `benchmarks.float8_speed`.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.interleaved import interleaved, ratio
from dsv3_jax.command_line import run_main
from dsv3_jax.errors import UserError
from dsv3_jax.kernels import scaled_matmul
from dsv3_jax.kernels.grouped_matmul import grouped_gradient_of_weights, grouped_matmul
from dsv3_jax.kernels.quantization import Recipe, quantized_blocks, quantized_columns, quantized_rows, token_tiles
from sharding.mesh import device_kind

EXPERTS, ROWS = 8, 32768
"""Of one device: where each has 4,096 tokens, balanced routing gives it so many rows, whatever the devices are."""
LAYERS = {"gate and up": (7168, 2 * 2048), "down": (2048, 7168)}
REPEATED = 10


def main() -> None:
    kind = device_kind()
    if not scaled_matmul.multiplies_float8(kind):
        raise UserError(f"{kind} has no products of FP8 to measure; an H200 or a tpu7x has")
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for layer, (depth, width) in LAYERS.items():
        for name, sides in products(depth, width).items():
            found = interleaved(sides, rounds)
            flops = 2 * ROWS * depth * width
            rates = {side: flops / statistics.median(seconds) / 1e12 for side, seconds in found.items()}
            print(f"{layer}, {name}: " + ", ".join(f"{side} {rate:.0f}" for side, rate in rates.items()) + " TFLOP/s")
            for side in ("bfloat16", "dense"):
                print(f"    fp8 / {side} {ratio(found[side], found['fp8'])}", flush=True)


def products(depth: int, width: int) -> dict[str, dict[str, Callable[[], float]]]:
    """Of each product and each of its sides, what measures the seconds of one call."""
    random, recipe = np.random.default_rng(0), Recipe()
    sizes = jnp.asarray(np.bincount(random.integers(0, EXPERTS, ROWS), minlength=EXPERTS), jnp.int32)
    tiles = token_tiles(sizes, ROWS)
    rows, gradient = (jnp.asarray(random.standard_normal((ROWS, size)), jnp.bfloat16) for size in (depth, width))
    weights = jnp.asarray(random.standard_normal((EXPERTS, depth, width)), jnp.bfloat16)
    blocks = quantized_blocks(weights, recipe)
    by_row, gradient_by_row = quantized_rows(rows, recipe), quantized_rows(gradient, recipe)
    by_column, gradient_by_column = (quantized_columns(each, recipe, tiles) for each in (rows, gradient))

    def in_bfloat16(function: Callable) -> Callable:
        return lambda *operands: function(*operands, jnp.bfloat16)

    return {
        "product": {
            "fp8": timed(in_bfloat16(scaled_matmul.grouped_product), by_row, blocks, sizes),
            "bfloat16": timed(grouped_matmul, rows, weights, sizes),
            "dense": timed(jnp.matmul, rows, weights[0]),
        },
        "gradient of rows": {
            "fp8": timed(in_bfloat16(scaled_matmul.grouped_input_gradient), gradient_by_row, blocks, sizes),
            "bfloat16": timed(grouped_matmul, gradient, weights.swapaxes(1, 2), sizes),
            "dense": timed(jnp.matmul, gradient, weights[0].T),
        },
        "gradient of weights": {
            "fp8": timed(scaled_matmul.grouped_weight_gradient, by_column, gradient_by_column, sizes),
            "bfloat16": timed(grouped_gradient_of_weights, rows, gradient, sizes),
            "dense": timed(jnp.matmul, rows.T, gradient),
        },
    }


def timed(function: Callable, *operands: Any) -> Callable[[], float]:
    compiled = jax.jit(function).lower(*operands).compile()
    jax.block_until_ready(compiled(*operands))

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(REPEATED):
            result = compiled(*operands)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / REPEATED

    return seconds


if __name__ == "__main__":
    run_main(main)
