"""One host and several print the same line for an error."""

import errno
import sys

import pytest

from bitdance_jax.cli import train
from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.processes import stop_all_on_error
from bitdance_jax.distributed import multihost
from bitdance_jax.errors import ConfigError, FileError


class FakeWatchdog:
    """Of a job with several processes: ends this one with the line."""

    def stop(self, reason):
        raise SystemExit(reason)


def of_several(monkeypatch, main):
    """The line that a command of several processes stops with."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(multihost, "_watchdog", FakeWatchdog())
        main()
    return f"error: {stop.value.code}\n"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--run.workdir mine", "or set another --run.workdir"),
        ("--tokenizer runs/t/model", "or use the embedded one: --tokenizer emoji"),
        ("--data.source folder --data.path none", "no image folder at none"),
    ],
)
def test_a_run(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "checkpoints" / "1").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["bitdance train", "emoji_4x", *flags.split()])
    assert run(train.main) == 2
    printed = capsys.readouterr().err
    assert line in printed
    assert of_several(monkeypatch, train.main) == printed


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("run.workdir must be new; set steps=3", "run.workdir"),
        FileError("a\x1bb exists"),
        OSError(errno.ENOSPC, "No space left on device", "out.png"),
    ],
)
def test_an_error(error, monkeypatch, capsys):
    def fail():
        with stop_all_on_error():
            raise error

    assert run(fail) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "\x1b" not in printed
    assert of_several(monkeypatch, fail) == printed


def test_a_bug_of_several_processes_has_a_traceback(monkeypatch, capsys):
    def fail():
        with stop_all_on_error():
            raise ZeroDivisionError("by 0")

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert of_several(monkeypatch, fail) == "error: ZeroDivisionError: by 0\n"
    assert "Traceback" in capsys.readouterr().err
