import os

import jax
import jax.numpy as jnp

from dsv3_jax.runtime import MULTI_OUTPUT_FUSION, use_multi_output_fusion


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
