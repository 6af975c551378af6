"""Files and folders that are replaced completely or not at all."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.io import atomic
from bitdance_jax.io.atomic import remove_temporary_files, replace_file, replace_folder
from bitdance_jax.io.locks import writer_lock


def test_remove_temporary_files_of_a_killed_process(tmp_path):
    kept = [tmp_path / "deep" / "x.png", tmp_path / ".hidden", tmp_path / ".backup.20260101"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    script = f"""
import os
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.locks import writer_lock
with writer_lock({str(tmp_path)!r}, is_folder=True):
    with replace_file({str(tmp_path / "deep" / "y.png")!r}) as temporary:
        temporary.touch()
        os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 5
    with writer_lock(tmp_path, is_folder=True):
        remove_temporary_files(tmp_path)
        with replace_file(tmp_path / "z.png") as temporary:
            temporary.touch()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*kept, tmp_path / "z.png"}


def test_replace_file_follows_symbolic_links(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "x.png").symlink_to("there/y.png")
    for content in ("first", "second"):
        with replace_file(tmp_path / "x.png") as temporary:
            temporary.write_text(content)
        assert (tmp_path / "x.png").is_symlink()
        assert (tmp_path / "there" / "y.png").read_text() == content


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe"), replace_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("RESOURCE_EXHAUSTED: x [os_error_code='122']"), "Disk quota exceeded"),
    ],
)
def test_write_errors(error, reason):
    with pytest.raises(UserError) as caught, atomic.write_errors("the file"):
        raise error
    assert str(caught.value) == f"cannot write the file: {reason}"


@pytest.mark.parametrize("error", [UserError("something else"), ZeroDivisionError()])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, atomic.write_errors("the file"):
        raise error
    assert caught.value is error


def write(folder: Path, content: str) -> None:
    with replace_folder(folder) as new:
        (new / "deep").mkdir()
        for name in ("a", "deep/b"):
            (new / name).write_text(content)


def content(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("a", "deep/b")]


KILLS = """
import os, signal, sys
from pathlib import Path
from test_atomic import content, write
from bitdance_jax.io import atomic
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
    atomic.recover_folder(folder)
    found.update(content(folder))
    try:  # again, on a full disk
        with atomic.replace_folder(folder) as new:
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
        "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{Path(__file__).parent}"
    }
    process = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 15  # the number of steps


def test_a_failed_block_leaves_the_old_folder(tmp_path):
    write(tmp_path / "model", "old")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with (
            pytest.raises((UserError, KeyboardInterrupt)),
            replace_folder(tmp_path / "model") as new,
        ):
            (new / "a").write_text("half")
            raise error
        assert content(tmp_path / "model") == ["old", "old"] and os.listdir(tmp_path) == ["model"]


def test_replace_folder_follows_symbolic_links(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk/there")
    for text in ("first", "second"):
        write(tmp_path / "model", text)
        assert os.readlink(tmp_path / "model") == "disk/there" and content(
            tmp_path / "disk" / "there"
        ) == [text, text]
    assert os.listdir(tmp_path / "disk") == ["there"]


def test_free_space_is_checked_on_the_disk_of_the_target(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "there")

    def disk_usage(path):
        return types.SimpleNamespace(
            free=2**20 if tmp_path / "disk" in Path(path).parents else 2**40
        )

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with (
        pytest.raises(UserError, match=r"model needs 2\.0 MiB"),
        replace_folder(tmp_path / "model", 2**21),
    ):
        pass
    assert not any((tmp_path / "disk").iterdir())


def test_a_second_writer_is_refused(tmp_path):
    with replace_folder(tmp_path / "model") as new:
        with (
            pytest.raises(UserError, match="another process is writing"),
            replace_folder(tmp_path / "model"),
        ):
            pass
        (new / "a").write_text("mine")
    assert (tmp_path / "model" / "a").read_text() == "mine"


def test_a_reader_between_the_two_renames(tmp_path, monkeypatch):
    write(tmp_path / "model", "old")
    rename = os.rename

    def rename_and_read(source, target):
        rename(source, target)
        atomic.recover_folder(tmp_path / "model")

    monkeypatch.setattr(os, "rename", rename_and_read)
    write(tmp_path / "model", "new")
    assert content(tmp_path / "model") == ["new", "new"] and os.listdir(tmp_path) == ["model"]


def test_the_root_of_a_disk_is_refused():
    atomic.recover_folder(Path("/"))
    with pytest.raises(UserError, match=r"^/ is a disk of its own"):
        write(Path("/"), "new")
