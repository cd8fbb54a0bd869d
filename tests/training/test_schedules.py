"""The schedules reproduce the token counts that the V3 report publishes (section 4.2)."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.tiny import config as tiny
from configs.v3_671b import config as v3
from dsv3_jax.training.schedules import bias_speed, learning_rate, loss_weights

TRILLION = 10**12
STEPS = v3.training.steps


def _step(tokens: float) -> int:
    """The step that begins after this many tokens."""
    return round(tokens / (v3.training.batch_size * v3.training.sequence_length))


def _rate(step: int) -> float:
    return float(learning_rate(step, v3.optimizer, STEPS))


def test_the_released_run_has_its_published_length():
    assert v3.training.tokens == 14.8 * TRILLION
    assert v3.training.batch_size * v3.training.sequence_length == 62_914_560
    assert pytest.approx(235_240, abs=1) == STEPS


def test_warm_up_is_linear_over_two_thousand_steps_and_moves_from_the_first():
    rates = np.array([_rate(step) for step in (0, 1, 499, 999, 1999, 2000)])
    np.testing.assert_allclose(rates, 2.2e-4 * np.array([1, 2, 500, 1000, 2000, 2000]) / 2000, rtol=1e-6)


@pytest.mark.parametrize(
    ("trillions", "rate"),
    [
        (1, 2.2e-4),
        (9.999, 2.2e-4),
        (10 + 4.3 / 3, 2.2e-5 + 0.75 * (2.2e-4 - 2.2e-5)),  # a third of the cosine: (1 + cos 60 deg) / 2
        (10 + 4.3 / 2, 1.21e-4),
        (10 + 4.3 * 2 / 3, 2.2e-5 + 0.25 * (2.2e-4 - 2.2e-5)),
        (14.301, 2.2e-5),
        (14.632, 2.2e-5),
        (14.634, 7.3e-6),
        (14.7999, 7.3e-6),
    ],
)
def test_published_learning_rates(trillions, rate):
    assert _rate(_step(trillions * TRILLION)) == pytest.approx(rate, rel=1e-3)


def test_the_rate_never_rises_after_warm_up_and_falls_at_once_only_into_the_last_tail():
    rates = np.array(learning_rate(np.arange(2000, STEPS, 50), v3.optimizer, STEPS))
    falls = rates[:-1] - rates[1:]
    assert falls.min() > -1e-11  # float32 rounding of the cosine
    (jump,) = np.flatnonzero(falls > 1e-6)
    assert (rates[jump], rates[jump + 1]) == (np.float32(2.2e-5), pytest.approx(7.3e-6))


@pytest.mark.parametrize(
    ("trillions", "speed", "mtp"),
    [
        (0, 0.001, 0.3),
        (9.999, 0.001, 0.3),
        (10.001, 0.001, 0.1),
        (14.299, 0.001, 0.1),
        (14.301, 0, 0.1),
        (14.79, 0, 0.1),
    ],
)
def test_bias_speed_and_mtp_weight_at_published_token_counts(trillions, speed, mtp):
    step = _step(trillions * TRILLION)
    assert float(bias_speed(step, v3)) == np.float32(speed)
    weights = loss_weights(step, v3.loss, STEPS)
    assert (float(weights.mtp), float(weights.balance)) == (np.float32(mtp), np.float32(1e-4))


def test_a_traced_step_gives_the_same_float32_as_a_number():
    for step in (0, 1999, 160_000, 200_000, 234_000):
        traced = jax.jit(lambda step: learning_rate(step, v3.optimizer, STEPS))(step)
        assert traced.dtype == np.float32 and traced.shape == ()
        assert float(traced) == pytest.approx(_rate(step), rel=1e-6)
        assert float(jax.jit(lambda step: bias_speed(step, v3))(step)) == float(bias_speed(step, v3))


def test_a_short_run_has_every_phase_and_a_run_without_warm_up_starts_at_the_peak():
    optimizer = dataclasses.replace(tiny.optimizer, warmup_steps=0, learning_rate=1.0)
    rates = [float(learning_rate(step, optimizer, 148)) for step in range(148)]
    assert rates[:101] == [1.0] * 101 and 0.1 < rates[142] < 0.11
    np.testing.assert_allclose(rates[143:147], 0.1, rtol=1e-6)
    np.testing.assert_allclose(rates[147], 7.3 / 220, rtol=1e-6)


def test_phases_of_no_length_are_skipped():
    optimizer = dataclasses.replace(
        tiny.optimizer, warmup_steps=0, learning_rate=1.0, constant_until=0.5, cosine_until=0.5, first_tail_until=1.0
    )
    rates = [float(learning_rate(step, optimizer, 10)) for step in range(10)]
    np.testing.assert_allclose(rates, [1] * 6 + [0.1] * 4, rtol=1e-6)
