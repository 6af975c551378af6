"""Where compiled programs are kept. That a second start finds them: tests/train/test_resume.py."""

import shutil
import warnings
from collections import namedtuple
from pathlib import Path

import jax
import pytest

from bitdance_jax import UserError
from bitdance_jax.cli import compilation_cache
from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.distributed import multihost


NAMES = [
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_enable_xla_caches",
    "jax_persistent_cache_min_compile_time_secs",
]


@pytest.fixture(autouse=True)
def enabled(monkeypatch, tmp_path):
    """The cache may be used, the user's folder is empty, and nothing is compiled meanwhile."""
    before = {name: jax.config.values[name] for name in NAMES}
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("BITDANCE_CACHE", str(tmp_path / "user"))
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def setting(name: str) -> object:
    return jax.config.values[f"jax_compilation_cache_{name}"]


def test_by_default_they_are_in_the_users_cache_which_has_a_limit(tmp_path):
    keep_compiled()
    assert setting("dir") == str(tmp_path / "user" / "compiled")
    assert setting("max_size") == compilation_cache.MAX_BYTES


def test_jax_s_own_settings_win(tmp_path):
    jax.config.update("jax_compilation_cache_max_size", 1000)
    jax.config.update("jax_compilation_cache_dir", "chosen")
    keep_compiled()
    assert setting("dir") == "chosen"
    keep_compiled(str(tmp_path / "flag"))
    assert setting("dir") == str(tmp_path / "flag")
    assert setting("max_size") == 1000


def switched_off(monkeypatch: pytest.MonkeyPatch, user: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)


def not_writable(monkeypatch: pytest.MonkeyPatch, user: Path) -> None:
    user.write_text("a file")


def full(monkeypatch: pytest.MonkeyPatch, user: Path) -> None:
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - 2**20, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


def one_of_several_processes(monkeypatch: pytest.MonkeyPatch, user: Path) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)


@pytest.mark.parametrize("why", [switched_off, not_writable, full, one_of_several_processes])
def test_a_command_runs_without_the_users_cache(monkeypatch, tmp_path, why):
    why(monkeypatch, tmp_path / "user")
    keep_compiled()
    assert setting("dir") is None


def test_a_chosen_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "folder" / ".lockfile").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*folder: Is a directory"):
        keep_compiled(str(tmp_path / "folder"))


def test_a_folder_that_not_all_processes_see_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "on_process_0", lambda action: action())
    monkeypatch.setattr(multihost, "all_true", lambda seen: False)
    with pytest.raises(UserError, match=r"not all processes see .*; set compilation_cache to"):
        keep_compiled(str(tmp_path))
    assert setting("dir") is None and list(tmp_path.iterdir()) == []


def test_what_a_kill_left_unfinished_is_removed(tmp_path):
    for name in ("whole-cache", "whole-atime", "half-cache", "other"):
        (tmp_path / name).write_text("")
    keep_compiled(str(tmp_path))
    left = {path.name for path in tmp_path.iterdir()} - {".lockfile"}
    assert left == {"whole-cache", "whole-atime", "other"}
