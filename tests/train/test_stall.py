"""How long a step may take. Runs that are stuck: test_resume.py and test_multi_host.py."""

import threading
from types import SimpleNamespace

import pytest

from bitdance_jax.distributed import multihost
from bitdance_jax.train import stall
from bitdance_jax.train.stall import StallHook


pytestmark = pytest.mark.usefixtures("as_users_call")  # without a complete RunContext

START = 10
"""Steps of an earlier process."""


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(stall.time, "monotonic", lambda: now.seconds)
    return now


def train(hook, clock, seconds, first=START + 1):
    """Takes a step for each of these times, and begins another one."""
    for step, duration in enumerate(seconds, start=first):
        hook.before_step(step, None)
        clock.seconds += duration
    hook.before_step(first + len(seconds), None)
    return hook._waiting


def started(minutes):
    hook = StallHook(minutes)
    hook.start(SimpleNamespace(start=START))
    return hook


def test_a_step_may_take_twenty_medians_and_no_less_than_the_minutes(clock):
    hook = started(None)
    hook._floor = 60.0
    assert train(hook, clock, []) == (11, 360, None)  # compiles
    assert train(hook, clock, [50.0]) == (12, 60, None)
    assert train(hook, clock, [2.0, 2.0, 90.0], first=12) == (15, 60, 2)
    assert train(hook, clock, 5 * [8.0], first=15) == (20, 160, 8)


def test_other_hooks_have_longer(clock):
    hook = started(None)
    hook._floor = 60.0
    train(hook, clock, [50.0, 2.0])
    hook.after_step(SimpleNamespace(step=13))
    assert hook._waiting.seconds == 360
    assert train(hook, clock, [], first=14).seconds == 60


@pytest.fixture
def stopped(monkeypatch):
    """What the thread of a hook does, in a thread of the test's."""
    monkeypatch.setattr(stall, "TICK", 0.01)
    seen = SimpleNamespace(event=threading.Event(), calls=[])

    def stop_all(reason, *, stacks):
        seen.calls.append((reason, stacks))
        seen.event.set()

    monkeypatch.setattr(multihost, "stop_all", stop_all)
    return seen


def test_a_step_that_takes_longer_ends_all_processes(stopped):
    hook = started(0.1 / 60)
    hook.before_step(START + 1, None)
    hook.before_step(START + 2, None)
    assert stopped.event.wait(30)
    hook.close()
    reason, stacks = stopped.calls[0]
    assert stacks and reason.startswith("step 12 is stuck: it has taken 0 s; ")


@pytest.mark.parametrize("minutes", [None, 0.1 / 60])
def test_it_ends_nothing_when_switched_off_or_closed(stopped, minutes):
    hook = started(minutes)
    if minutes is not None:
        hook.close()
    assert not stopped.event.wait(1)
