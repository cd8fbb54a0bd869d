"""Tests that compile for TPUs: collected where libtpu is installed (requirements-plan.txt), as in .ci/run."""

import importlib.util

import pytest

if importlib.util.find_spec("libtpu") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module", autouse=True)
def as_a_user_compiles(optimized):
    """What the compiler makes of a program is what these tests are about."""
