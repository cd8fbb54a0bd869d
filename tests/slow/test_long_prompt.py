"""131,072 tokens in bounded memory: both ways in take them, and make the same of them."""

import json
import subprocess
import sys
from pathlib import Path

from tests.slow.long_prompt import LENGTH, MODEL, NEW

ROOT = Path(__file__).parents[2]
# What is proportional to the prompt: the cache, which the Generator allocates up to the model's last position.
CACHE = MODEL.layers * MODEL.maximum_positions * MODEL.cache_width * 4
# jax and its compiler, the weights, and one piece. A piece's logits alone, of all its tokens over all entries, would be
# 1 GiB or more a layer, and a copy of the cache a piece 64 times 67 MB.
MOST_MEMORY = CACHE + 900 * 10**6


def made_by(way: str) -> dict:
    command = [sys.executable, "-m", "tests.slow.long_prompt", way]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_both_ways_take_a_prompt_of_131072_tokens_in_bounded_memory():
    assert LENGTH == 131_072
    of_generator, of_engine = made_by("generator"), made_by("engine")
    print(of_generator, of_engine)
    assert of_generator["token_ids"] == of_engine["token_ids"] and len(of_generator["token_ids"]) == NEW
    assert max(of_generator["peak"], of_engine["peak"]) <= MOST_MEMORY
