"""Tests that compile for TPUs: collected where libtpu is installed (requirements-plan.txt), as in .ci/run."""

import importlib.util

if importlib.util.find_spec("libtpu") is None:
    collect_ignore_glob = ["test_*.py"]
