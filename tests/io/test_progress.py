"""The bar: what it says, and that only the work itself enters its rate."""

import time

import pytest

from bitdance_jax.io import progress
from bitdance_jax.io.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the bars see, to be set."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_neither_compiling_nor_what_is_done_between_enters_the_rate(clock):
    with Progress(10, "image", "sampling") as bar:
        assert bar.desc == "compiling"
        clock[0] = 60
        bar.advance(2)
        assert bar.n == 2 and bar.desc == "sampling"
        for second in (61, 62):
            clock[0] = second
            bar.advance(3)
        clock[0] = 63  # the next units are at work already
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


def test_a_run_that_goes_on_counts_only_its_own_steps(clock):
    with Progress(100, "step", "training", initial=50) as bar:
        clock[0] = 60
        bar.advance(1)
        clock[0] = 62
        bar.advance(1)
        assert bar.n == 52 and bar.format_dict["rate"] == pytest.approx(0.5)


def test_a_bar_that_is_not_shown_says_nothing(capfd):
    with Progress(3, "image", "sampling", shown=False) as bar:
        bar.advance(1)
        with bar.doing("saving"):
            bar.advance(2)
    assert capfd.readouterr().err == ""


def test_a_slow_compilation_is_explained_before_xla_complains(monkeypatch, capfd):
    monkeypatch.setattr(progress, "SECOND", 0.001)
    monkeypatch.setattr(progress, "SLOW_COMPILATION", 3)
    with Progress(1, "image", "sampling") as bar:
        time.sleep(0.3)
        bar.advance(1)
        with bar.doing("saving"):
            time.sleep(0.1)
    assert capfd.readouterr().err.count("is no error") == 1
