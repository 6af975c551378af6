"""The progress bar: its description, and that its rate counts only the work itself."""

import time

import pytest

from bitdance_jax.io import progress
from bitdance_jax.io.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The time that the bars read, in seconds. Tests set it."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_compiling_and_other_activities_do_not_count_for_the_rate(clock):
    with Progress(10, "image", "sampling") as bar:
        assert bar.desc == "compiling"
        clock[0] = 60
        bar.advance(2)
        assert bar.n == 2 and bar.desc == "sampling"
        for second in (61, 62):
            clock[0] = second
            bar.advance(3)
        clock[0] = 63  # The next units have started.
        with bar.doing("saving"):
            assert bar.desc == "saving"
            clock[0] = 100
        assert bar.desc == "sampling"
        clock[0] = 101
        bar.advance(2)
        shown = bar.format_dict
        assert (shown["n"], shown["elapsed"]) == (10, 4)
        assert 1 < shown["rate"] < 3
    assert "10/10 [00:04<00:00,  2.00image/s]" in str(bar)


def test_a_resumed_run_counts_only_its_own_steps(clock):
    with Progress(100, "step", "training", initial=50) as bar:
        clock[0] = 60
        bar.advance(1)
        clock[0] = 62
        bar.advance(1)
        assert bar.n == 52 and bar.format_dict["rate"] == pytest.approx(0.5)


def test_a_hidden_bar_prints_nothing(capfd):
    with Progress(3, "image", "sampling", shown=False) as bar:
        bar.advance(1)
        with bar.doing("saving"):
            bar.advance(2)
    assert capfd.readouterr().err == ""


def test_a_note_on_slow_compilation(monkeypatch, capfd):
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.001)
    monkeypatch.setattr(progress, "SLOW_COMPILATION", 3)
    with Progress(1, "image", "sampling") as bar:
        time.sleep(0.3)
        bar.advance(1)
        with bar.doing("saving"):
            time.sleep(0.1)
    assert capfd.readouterr().err.count("not an error") == 1
