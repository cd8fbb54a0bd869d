import os
import signal

import pytest

from dsv3_jax.training.interruption import catch_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_an_answer_between_steps(number):
    with catch_signals() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), number)
        assert interrupted()


def test_a_second_sigint_does_not_wait():
    with pytest.raises(KeyboardInterrupt), catch_signals() as interrupted:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_handlers_before_come_back(error):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with catch_signals():
            assert signal.getsignal(signal.SIGTERM) not in before
            if error:
                raise error
    except RuntimeError:
        pass
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
