"""One process at a time writes into a folder, and what killed ones left there goes."""

import errno
import os
import signal
import subprocess
import sys
import threading

import filelock
import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.io.files import (
    check_ending,
    check_name,
    named,
    only_writer,
    remove_leftovers,
    replacing,
    write_errors,
)


HOLD = """
import os, sys, time
from bitdance_jax.io.files import only_writer
with only_writer(sys.argv[1], is_folder=sys.argv[2] == "True"):
    if os.fork():
        os.write(1, b"here")
    time.sleep(60)
"""


@pytest.mark.parametrize("is_folder", [True, False])
def test_another_writer_is_refused_until_the_first_is_done_or_killed(tmp_path, is_folder):
    """Also where a child process of the killed one lives on."""
    place = tmp_path / "new" / "x"
    command = [sys.executable, "-c", HOLD, str(place), str(is_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout.read(4) == b"here"
            other = "another folder" if is_folder else "another name"
            with pytest.raises(
                UserError,
                match=f"^another process is writing {place}; wait for it, or give {other}$",
            ):
                with only_writer(place, is_folder=is_folder):
                    pass
            process.kill()
            process.wait()
            with only_writer(place, is_folder=is_folder):
                with pytest.raises(UserError, match=r"^another process is writing "):
                    with only_writer(place, is_folder=is_folder):
                        pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_of_many_that_come_at_once_one_writes_at_a_time(tmp_path):
    inside, most, done = [], [], []

    def write():
        for _ in range(200):
            try:
                with only_writer(tmp_path, is_folder=True):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    done.append(1)
            except UserError:
                pass

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done and max(most) == 1
    assert not list(tmp_path.iterdir())


def test_a_lock_leaves_nothing_of_its_own(tmp_path):
    with only_writer(tmp_path / "new" / "x", is_folder=True):
        assert (tmp_path / "new" / "x").is_dir()
    assert not (tmp_path / "new" / "x").exists()
    with only_writer(tmp_path / "new", is_folder=True):
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_file_system_without_locks_and_one_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    def refuse(number):
        def acquire(self):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(filelock.FileLock, "_acquire", acquire)

    refuse(errno.ENOLCK)
    with only_writer(tmp_path, is_folder=True):
        assert capsys.readouterr().err.startswith(f"warning: {tmp_path} cannot be locked (")
    refuse(errno.EROFS)
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}: Read-only file system$"):
        with only_writer(tmp_path, is_folder=True):
            pass


def test_a_killed_writers_leftovers_go(tmp_path):
    kept = [tmp_path / "deep" / "x.png", tmp_path / ".hidden", tmp_path / ".backup.20260101"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    script = f"""
import os
from bitdance_jax.io.files import only_writer, replacing
with only_writer({str(tmp_path)!r}, is_folder=True), replacing({str(tmp_path / "deep" / "y.png")!r}) as temporary:
    temporary.touch()
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 5
    with only_writer(tmp_path, is_folder=True):
        remove_leftovers(tmp_path)
        with replacing(tmp_path / "z.png") as temporary:
            temporary.touch()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*kept, tmp_path / "z.png"}


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "x.png").symlink_to("there/y.png")
    for content in ("first", "second"):
        with replacing(tmp_path / "x.png") as temporary:
            temporary.write_text(content)
        assert (tmp_path / "x.png").is_symlink()
        assert (tmp_path / "there" / "y.png").read_text() == content


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(UserError, match="pipe: it is a device or a pipe"),
        replacing(tmp_path / "pipe"),
    ):
        pass
    assert not (tmp_path / "pipe").is_file()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device"),
            "^cannot write the file: No space left on device$",
        ),
        (
            ValueError("RESOURCE_EXHAUSTED: x [os_error_code='122']"),
            "^cannot write the file: Disk quota exceeded$",
        ),
        (UserError("something else"), "^something else$"),
    ],
)
def test_why_something_cannot_be_written(error, message):
    with pytest.raises(UserError, match=message), write_errors("the file"):
        raise error


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), write_errors("the file"):
        raise ZeroDivisionError


def test_names_that_orbax_cannot_write(tmp_path):
    for name in ("a[b", "a*", os.fsdecode(b"\xff")):
        with pytest.raises(UserError, match=r"give (it )?another"):
            check_name(tmp_path / name)
    with pytest.raises(UserError, match="is not UTF-8; give it another one"):
        named(os.fsdecode(b"images/\xff"))
    with pytest.raises(UserError, match="cannot be the name of a file"):
        named("a\0b")


@pytest.mark.parametrize("path", ["thesis.txt", "png", "gs://bucket/x.png"])
def test_other_files_are_not_written_over(path):
    with pytest.raises(UserError, match=r"^--out must be a local file that ends in \.png, got "):
        check_ending(path, ".png", "--out")
    check_ending("x.PNG", ".png", "--out")
