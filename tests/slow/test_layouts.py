"""The tests of tests/training/test_layouts.py on the layouts that it leaves out."""

import pytest

from tests.training.test_layouts import (  # noqa: F401
    FEW,
    LAYOUTS,
    test_copies_of_a_piece_are_the_same_bits_on_every_device,
    test_ten_steps_are_those_of_one_device,
    test_the_compiled_step_has_the_collectives_the_layout_needs_and_no_other,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", [layout for layout in LAYOUTS if layout not in FEW])
