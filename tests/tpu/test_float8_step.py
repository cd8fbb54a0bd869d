"""A training step in FP8 as it is handed to the compiler for tpu7x: what it multiplies and sends, beside BF16's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROWS = 4096 * 8
"""That a device sends: its tokens to 8 experts each."""


def _lowered(precision: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.tpu.lowered_step", precision]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    return {precision: _lowered(precision) for precision in ("fp8", "bfloat16")}


def test_linear_layers_and_experts_multiply_fp8(steps):
    fp8, bfloat16 = steps["fp8"], steps["bfloat16"]
    # Product and two gradients each: five layers of attention, two of the shared expert, two of the others.
    assert len(fp8["kernels"]) >= 3 * 9
    assert all(kernel.count("f8E4M3FN") == 2 and "bf16" not in kernel for kernel in fp8["kernels"])
    assert fp8["flops"]["float8_e4m3fn"] > 0.9 * sum(bfloat16["flops"].values())
    # What is left is attention's core, the head and the router.
    assert fp8["flops"]["float32"] == bfloat16["flops"]["float32"]


def test_tokens_and_their_gradients_travel_to_experts_in_half_the_bytes(steps):
    """A row of 7168 codes and 56 scales fills 7296 bytes; answers and their gradients stay bfloat16."""
    sent = {precision: [tuple(each) for each in step["sent"]] for precision, step in steps.items()}
    assert [each for each in sent["fp8"] if each[0] == "ui8"] == [("ui8", ROWS * 7296)] * 3
    assert sent["bfloat16"].count(("bf16", ROWS * 7168 * 2)) == 3
    assert [each for each in sent["fp8"] if each[0] != "ui8"] == [
        each for each in sent["bfloat16"] if each != ("bf16", ROWS * 7168 * 2)
    ]
