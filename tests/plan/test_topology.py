import importlib.util

import pytest

from dsv3_jax.errors import ArgumentError, UserError
from dsv3_jax.plan.topology import topology


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("v5p", ["--topology=v5p must be a chip and its sides", "v5p:4x4x8", "tpu7x:4x4x8"]),
        ("v5q:4x4x8", ["there is no chip v5q (did you mean v5p?)", "there are v4, v5e, v5p, v6e, tpu7x"]),
        ("v5p:16x16", ["v5p needs 3 sides, as v5p:4x4x8 has"]),
        ("v6e:4x0", ["v6e needs 2 sides"]),
    ],
)
def test_a_machine_that_there_is_not_is_one_line_that_says_which_there_are(name, parts):
    with pytest.raises(ArgumentError) as caught:
        topology(name)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu is missing.*pip install 'jax\[tpu\]'") as caught:
        topology("v5p:4x4x8")
    assert caught.value.exit_code == 1
