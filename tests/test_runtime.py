import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs.small import config as small
from configs.tiny import config as tiny
from dsv3_jax.runtime import MULTI_OUTPUT_FUSION, THREADS, use_multi_output_fusion, use_one_thread


def test_xla_computes_two_results_in_one_pass():
    # tests/conftest.py has set the flag: the compiler must know it under this name.
    array = jnp.ones(4096)
    compiled = jax.jit(lambda x, y: (2 * x + y, 3 * x - y)).lower(array, array).compile()
    fusions = [line for line in compiled.as_text().splitlines() if " fusion(" in line]
    assert len(fusions) == 1 and " = (f32[4096]{0}, f32[4096]{0}) fusion(" in fusions[0]


def test_flags_given_by_the_user_are_kept(monkeypatch):
    for given, expected in (
        ("", MULTI_OUTPUT_FUSION),
        ("--xla_dump_to=/x", f"--xla_dump_to=/x {MULTI_OUTPUT_FUSION}"),
        ("--xla_backend_extra_options=other", "--xla_backend_extra_options=other"),
    ):
        monkeypatch.setenv("XLA_FLAGS", given)
        use_multi_output_fusion()
        use_multi_output_fusion()
        assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize(("given", "config", "expected"), [(None, tiny, "1"), ("3", tiny, "3"), (None, small, None)])
def test_a_small_model_gets_one_thread_unless_the_user_says_how_many(monkeypatch, given, config, expected):
    monkeypatch.setattr(os, "environ", {} if given is None else {THREADS: given})
    use_one_thread(config.model)
    assert os.environ.get(THREADS) == expected


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts the threads as Linux names them")
def test_xla_starts_one_thread():
    script = """
import pathlib
from configs.tiny import config
from dsv3_jax.runtime import use_one_thread
use_one_thread(config.model)
import jax
jax.numpy.ones(3).block_until_ready()
names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print(sum("XLAEigen" in name for name in names))
"""
    environment = {name: value for name, value in os.environ.items() if name not in (THREADS, "NPROC", "XLA_FLAGS")}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1"]


def test_freed_memory_is_used_again():
    """A block that is freed and asked for again costs no page faults, which clearing it anew would."""
    program = """
import resource, sys
import numpy as np
from dsv3_jax.runtime import keep_freed_memory
keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 * 2**20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    faults = {
        choice: int(
            subprocess.run([sys.executable, "-c", program, choice], env=environment, capture_output=True).stdout
        )
        for choice in ("keep", "leave")
    }
    assert faults["keep"] < 100 < faults["leave"]
