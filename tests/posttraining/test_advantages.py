import numpy as np
import pytest

from dsv3_jax.posttraining.advantages import group_advantages

ALL = np.ones((1, 4), bool)


@pytest.mark.parametrize("divide", [True, False])
def test_advantages_are_relative_to_the_group(divide):
    rewards = np.array([[1.0, 0.0, 0.0, 1.1], [3.0, 2.0, 1.0, 0.5]])
    found = group_advantages(rewards, rewards, np.ones((2, 4), bool), divide)
    for row, advantages in zip(rewards, found.values_PG, strict=True):
        expected = (row - np.mean(row)) / (np.std(row) if divide else 1)
        np.testing.assert_allclose(advantages, expected, rtol=1e-5)
    assert found.mixed_P.all() and found.values_PG.dtype == np.float32


def test_trap_L6_a_group_is_mixed_by_what_the_verifier_gave_not_by_what_was_taken_off():
    """All wrong, and of different lengths: a standard deviation of 1 made of penalties would be all there is."""
    verified = np.array([[0.1] * 4, [0.1, 0.1, 1.1, 0.1]])
    penalties = np.array([[0.0, 0.3, 0.1, 0.2]] * 2)
    found = group_advantages(verified - penalties, verified, np.ones((2, 4), bool), True)
    np.testing.assert_array_equal(found.mixed_P, [False, True])
    assert not found.values_PG[0].any() and found.values_PG[1].all()


def test_trap_L6_rounding_mixes_no_group():
    rewards = np.full((1, 3), 0.1)  # their standard deviation is not 0
    assert np.std(rewards) > 0
    found = group_advantages(rewards, rewards, np.ones((1, 3), bool), True)
    assert not found.mixed_P.any() and not found.values_PG.any()


def test_a_response_without_a_verdict_is_in_no_mean():
    rewards, judged = np.array([[1.0, 0.0, 0.0, 0.0]]), np.array([[True, True, False, True]])
    found = group_advantages(rewards, rewards, judged, True)
    alone = group_advantages(rewards[:, [0, 1, 3]], rewards[:, [0, 1, 3]], ALL[:, :3], True)
    np.testing.assert_array_equal(found.values_PG[:, [0, 1, 3]], alone.values_PG)
    assert found.values_PG[0, 2] == 0


@pytest.mark.parametrize("judged", [[True, False, False, False], [False] * 4])
def test_a_group_with_at_most_one_verdict_teaches_nothing(judged):
    rewards = np.array([[1.0, 0.0, 0.0, 0.0]])
    found = group_advantages(rewards, rewards, np.array([judged]), True)
    assert not found.mixed_P.any() and not found.values_PG.any()
