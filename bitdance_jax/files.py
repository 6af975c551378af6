"""Files that are there whole or not at all, and folders on a disk or under gs://."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from bitdance_jax.errors import UserError


try:
    import fcntl
except ModuleNotFoundError:  # Windows locks no folders
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], kind: str = "") -> Iterator[Path]:
    """Gives a place beside `path` to write to, which becomes `path` when the block ends and is removed if it fails.

    The folder is made if needed. `kind` stands before the path in the message, for example "the picture ".

    Raises:
      UserError: it cannot be written (permissions, full disk).
    """
    path = Path(path)
    # Drawn, for processes on several hosts may share the folder, and in containers their number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {kind}{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes that ask for it out of a local folder, which is there.

    Raises:
      UserError: another process is writing there.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            with contextlib.suppress(OSError):  # of file systems that lock no folders
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise UserError(f"another process is writing into {folder}; wait for it, or give another folder") from error
        yield


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what killed processes left of `replacing` in a local folder of ours, and in those below it."""
    for path in Path(folder).rglob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name):
            path.unlink(missing_ok=True)


def folder(path: str | os.PathLike[str]) -> epath.Path:
    """A local folder, made absolute, or one under gs://; made if it is not there.

    Raises:
      UserError: it cannot be made or reached: no library for gs://, no permission.
    """
    place = epath.Path(path if "://" in str(path) else os.path.abspath(path))
    try:
        place.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        raise UserError(f'{path} needs a library for Google Storage: pip install "bitdance_jax[gcs]"') from error
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from error
    return place
