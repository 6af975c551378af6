"""Folders that are there whole or not at all."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.io import whole_folder


def write(folder: Path, content: str) -> None:
    with whole_folder.writing(folder) as new:
        (new / "deep").mkdir()
        for name in ("a", "deep/b"):
            (new / name).write_text(content)


def content(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("a", "deep/b")]


KILLS = """
import os, signal, sys
from pathlib import Path
from test_whole_folder import content, write
from bitdance_jax import whole_folder
from bitdance_jax.errors import UserError

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}

def kill_before(number):
    left = [number]
    def hook(event, arguments):
        if event in EVENTS:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

root = Path(sys.argv[1])
for number in range(1000):
    parent = root / str(number)
    folder = parent / "model"
    parent.mkdir()
    write(folder, "old")
    if not (child := os.fork()):
        kill_before(number)
        write(folder, "new")
        os._exit(0)
    killed = os.waitpid(child, 0)[1] != 0
    found = set()
    whole_folder.recover(folder)
    found.update(content(folder))
    try:  # the same again on a full disk
        with whole_folder.writing(folder) as new:
            (new / "a").write_text("half")
            raise OSError(28, "No space left on device")
    except UserError:
        found.update(content(folder))
    assert len(found) == 1 and found <= {"old", "new"}, (number, found)
    write(folder, "newer")
    assert content(folder) == ["newer"] * 2 and os.listdir(parent) == ["model"], number
    if not killed:
        assert found == {"new"}
        print(number)
        break
"""


def test_a_kill_at_any_step_leaves_the_old_or_the_new_folder(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{Path(__file__).parents[1]}"
    }
    process = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 15  # so many steps


def test_a_failed_block_leaves_what_was_there(tmp_path):
    write(tmp_path / "model", "old")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with (
            pytest.raises((UserError, KeyboardInterrupt)),
            whole_folder.writing(tmp_path / "model") as new,
        ):
            (new / "a").write_text("half")
            raise error
        assert content(tmp_path / "model") == ["old", "old"] and os.listdir(tmp_path) == ["model"]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk/there")
    for text in ("first", "second"):
        write(tmp_path / "model", text)
        assert os.readlink(tmp_path / "model") == "disk/there" and content(
            tmp_path / "disk" / "there"
        ) == [text, text]
    assert os.listdir(tmp_path / "disk") == ["there"]


def test_free_space_is_that_of_the_disk_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "there")

    def disk_usage(path):
        return types.SimpleNamespace(
            free=2**20 if tmp_path / "disk" in Path(path).parents else 2**40
        )

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with (
        pytest.raises(UserError, match=r"model needs 2\.0 MiB, and its disk has 1\.0 MiB left"),
        whole_folder.writing(tmp_path / "model", 2**21),
    ):
        pass
    assert not any((tmp_path / "disk").iterdir())


def test_another_writer_is_refused(tmp_path):
    with whole_folder.writing(tmp_path / "model") as new:
        with (
            pytest.raises(UserError, match="another process is writing"),
            whole_folder.writing(tmp_path / "model"),
        ):
            pass
        (new / "a").write_text("mine")
    assert (tmp_path / "model" / "a").read_text() == "mine"


def test_a_reader_between_the_renames_does_no_harm(tmp_path, monkeypatch):
    write(tmp_path / "model", "old")
    rename = os.rename

    def rename_and_read(source, target):
        rename(source, target)
        whole_folder.recover(tmp_path / "model")

    monkeypatch.setattr(os, "rename", rename_and_read)
    write(tmp_path / "model", "new")
    assert content(tmp_path / "model") == ["new", "new"] and os.listdir(tmp_path) == ["model"]


def test_the_root_of_a_disk_is_no_place_for_a_folder():
    whole_folder.recover(Path("/"))
    with pytest.raises(UserError, match=r"^/ is a disk of its own"):
        write(Path("/"), "new")
