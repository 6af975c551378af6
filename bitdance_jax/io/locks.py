"""A lock on a local folder or file, so that one process at a time writes to it."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from bitdance_jax.errors import FileError
from bitdance_jax.io.paths import folder_made


LOCK = ".bitdance_jax.lock"

UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems that do not support locks."""


@contextlib.contextmanager
def writer_lock(path: str | os.PathLike[str], *, is_folder: bool) -> Iterator[None]:
    """Holds a lock on a local folder or file for the `with` block. Other hosts see it too.

    The operating system releases the lock of a process that is killed. The folder (or the folder of
    the file) is made if it is missing, with its parents; those made are removed again if they are
    empty at the end. Where the file system does not support locks, this prints a warning and locks
    nothing.

    Raises:
      FileError: another process holds the lock, or the lock file cannot be written.
    """
    path = Path(path)
    folder = path if is_folder else path.parent
    file = folder / LOCK if is_folder else path.with_name(f".{path.name}{LOCK}")
    # A soft lock would remain after a kill.
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder_made(folder))
            stack.enter_context(lock)
            # Runs before the lock is released, while no other process can hold it.
            stack.callback(_remove_file, file)
        except Timeout:
            kind = "folder" if is_folder else "name"
            raise FileError(
                f"another process is writing {path}; wait for it, or give another {kind}", path
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise FileError(f"cannot write {path}: {error.strerror or error}", path) from error
            _remove_file(file)
            print(
                f"warning: {folder} cannot be locked ({error.strerror});"
                " do not start a second run there",
                file=sys.stderr,
            )
        yield


def _remove_file(file: Path) -> None:
    with contextlib.suppress(OSError):  # Windows cannot remove an open file.
        file.unlink()
