"""Signals that save a run and stop it. Whole runs that get them are in test_resume.py and
test_multi_host.py."""

import os
import signal

import pytest

from bitdance_jax.train.stopping import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop_after_the_step(number):
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, before)  # whatever this process was started under
    with StopSignals() as signals:
        assert not signals.reached(1)
        os.kill(os.getpid(), number)
        assert signals.reached(2)
        assert signal.getsignal(number) == before  # a second one does what it always does
        assert signals.interruption("saved").exit_code == 128 + number


def test_under_nohup_the_terminal_may_be_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.reached(1)
    finally:
        signal.signal(signal.SIGHUP, before)
