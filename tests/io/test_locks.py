"""One process at a time writes to a folder or file."""

import errno
import os
import signal
import subprocess
import sys
import threading

import filelock
import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.io.locks import writer_lock


HOLD = """
import os, sys, time
from bitdance_jax.io.locks import writer_lock
with writer_lock(sys.argv[1], is_folder=sys.argv[2] == "True"):
    if not os.fork():  # The child has given up the lock before it gets here.
        os.write(1, b"here")
    time.sleep(60)
"""


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_second_writer_is_refused_until_the_first_ends_or_is_killed(tmp_path, is_folder):
    """Even if a child process of the killed one is still running."""
    path = tmp_path / "new" / "x"
    command = [sys.executable, "-c", HOLD, str(path), str(is_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout.read(4) == b"here"
            with pytest.raises(UserError, match=f"another process is writing {path}"):
                with writer_lock(path, is_folder=is_folder):
                    pass
            process.kill()
            process.wait()
            with writer_lock(path, is_folder=is_folder):
                with pytest.raises(UserError, match=str(path)):
                    with writer_lock(path, is_folder=is_folder):
                        pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_one_of_many_threads_writes_at_a_time(tmp_path):
    inside = []
    most = []
    done = []

    def write():
        for _ in range(200):
            try:
                with writer_lock(tmp_path, is_folder=True):
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
    assert done
    assert max(most) == 1
    assert not list(tmp_path.iterdir())


def test_a_lock_leaves_no_files(tmp_path):
    with writer_lock(tmp_path / "new" / "x", is_folder=True):
        assert (tmp_path / "new" / "x").is_dir()
    assert not (tmp_path / "new" / "x").exists()
    with writer_lock(tmp_path / "new", is_folder=True):
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_file_systems_without_locks_and_read_only_ones(tmp_path, monkeypatch, capsys):
    def refuse(number):
        def acquire(self):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(filelock.FileLock, "_acquire", acquire)

    refuse(errno.ENOLCK)
    with writer_lock(tmp_path, is_folder=True):
        assert capsys.readouterr().err.startswith(f"warning: {tmp_path} cannot be locked (")
    refuse(errno.EROFS)
    with pytest.raises(UserError, match=f"{tmp_path}: Read-only file system"):
        with writer_lock(tmp_path, is_folder=True):
            pass
