"""131,072 tokens in bounded memory: both ways in take them, and make the same of them."""

import json
import sys

import pytest

from tests.slow.long_prompt import LENGTH, MODEL, NEW
from tests.slow.peak_memory import run_and_measure

pytestmark = pytest.mark.usefixtures("optimized")

# What is proportional to the prompt: the cache, which the Generator allocates up to the model's last position.
CACHE = MODEL.layers * MODEL.maximum_positions * MODEL.cache_width * 4
# jax and its compiler, the weights, and one piece come to 0.8 or 0.9 GB. What this is to find is far above: a piece's
# logits of all its tokens over all entries would be 1 GiB or more a layer, a copy of the cache a piece 64 times 67 MB.
MOST_MEMORY = CACHE + 1_100 * 10**6


def made_by(way: str) -> tuple[list[int], int]:
    """The new tokens, and the most memory that it took to make them, in bytes."""
    output, peak = run_and_measure([sys.executable, "-m", "tests.slow.long_prompt", way])
    return json.loads(output.splitlines()[-1]), peak


def test_both_ways_take_a_prompt_of_131072_tokens_in_bounded_memory():
    assert LENGTH == 131_072
    (of_generator, peak_of_generator), (of_engine, peak_of_engine) = made_by("generator"), made_by("engine")
    print(f"the generator's peak {peak_of_generator / 1e6:,.0f} MB, the engine's {peak_of_engine / 1e6:,.0f} MB")
    assert of_generator == of_engine and len(of_generator) == NEW
    assert max(peak_of_generator, peak_of_engine) <= MOST_MEMORY
