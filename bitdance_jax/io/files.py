"""Files that are there whole or not at all, and folders on a disk or under gs://."""

import contextlib
import errno
import importlib.util
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from etils import epath
from filelock import FileLock, Timeout

from bitdance_jax.errors import UserError


LOCK = ".bitdance_jax.lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system says that locks no files."""


def named(path: str) -> str:
    """A path as a user names it, local or gs://, with the home folder in place of `~`.

    Raises:
      UserError: it is at another kind of place, the library for Google Storage is not there, or the
        name is not UTF-8.
    """
    check_text(path)
    scheme, is_remote, _ = path.partition("://")
    if is_remote and scheme != "gs":
        hint = (
            ", which `python -m bitdance_jax.convert OWNER/REPOSITORY OUT` does"
            if scheme == "hf"
            else ""
        )
        raise UserError(f"{path} is neither a local path nor one under gs://; fetch it first{hint}")
    if is_remote and not any(importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")):
        raise UserError(
            f'{path} needs a library for Google Storage: pip install "bitdance_jax[gcs]"'
        )
    return os.path.expanduser(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], kind: str = "") -> Iterator[Path]:
    """Gives a place beside `path` to write to, which becomes `path` when the block ends and is removed if it fails.

    The folder is made if needed. A symbolic link stays one, and the file behind it is replaced. `kind`
    stands before the path in the message, for example "the image ".

    Raises:
      UserError: it cannot be written (permissions, full disk).
    """
    place = Path(os.path.realpath(path))
    # Drawn, for processes on several hosts may share the folder, and in containers their number.
    temporary = place.with_name(f".bitdance_jax.{secrets.token_hex(8)}")
    with write_errors(f"{kind}{path}"):
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise UserError(f"cannot write {kind}{path}: it is a device or a pipe; name a file")
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_errors(what: str) -> Iterator[None]:
    """Makes one line of the system's or TensorStore's errors that say why something cannot be written.

    Raises:
      UserError: `what` cannot be written (permissions, full disk).
    """
    try:
        yield
    except Exception as error:
        code = re.search(r"\[os_error_code='(\d+)'\]", str(error))  # of TensorStore, in many types
        if isinstance(error, UserError) or not (isinstance(error, OSError) or code):
            raise
        reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {what}: {reason}") from error


@contextlib.contextmanager
def only_writer(path: str | os.PathLike[str], *, is_folder: bool) -> Iterator[None]:
    """Keeps other processes that ask for it, on any host, away from a local folder or file until the block ends.

    The system ends the lock of a process that is killed. The folder, or that of the file, is made if
    it is missing, and removed again if nothing is in it then. Where the file system locks nothing,
    a warning says so, and nobody is kept away.

    Raises:
      UserError: another process is writing there, or the lock cannot be written.
    """
    path = Path(path)
    folder = path if is_folder else path.parent
    file = folder / LOCK if is_folder else path.with_name(f".{path.name}{LOCK}")
    lock = FileLock(file, timeout=0, fallback_to_soft=False)  # A soft one outlives a kill.
    with contextlib.ExitStack() as stack:
        try:
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                stack.callback(_remove_if_empty, folder)
            stack.enter_context(lock)
            stack.callback(_remove_if_there, file)  # Before the lock ends: nobody else has it.
        except Timeout:
            other = "another folder" if is_folder else "another name"
            raise UserError(
                f"another process is writing {path}; wait for it, or give {other}"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"cannot write {path}: {error.strerror or error}") from error
            _remove_if_there(file)
            message = (
                f"warning: {folder} cannot be locked ({error.strerror}); start no second run there"
            )
            print(message, file=sys.stderr)
        yield


def remove_leftovers(folder: str | os.PathLike[str], *, below: bool = True) -> None:
    """Removes what killed processes left of `replacing` in a local folder of ours, and in those below it."""
    for path in (
        Path(folder).rglob(".bitdance_jax.*") if below else Path(folder).glob(".bitdance_jax.*")
    ):
        if re.fullmatch(r"\.bitdance_jax\.[0-9a-f]{16}", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def check_name(path: str | os.PathLike[str]) -> None:
    """Raises a UserError for a path where Orbax would lose what it writes, or cannot write or read.

    It takes "[" and "*" for patterns.
    """
    name = str(path) if "://" in str(path) else os.path.realpath(path)
    check_text(name)
    if found := [letter for letter in "[*" if letter in name]:
        raise UserError(
            f"no checkpoint can be written to {name}, because of the {found[0]}; give another place"
        )


def check_text(path: str | os.PathLike[str]) -> None:
    """Raises a UserError for a path with a NUL, or not UTF-8: the libraries that read and write take no other."""
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} cannot be the name of a file")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        line = f"the name {path} is not UTF-8; give it another one, or set PYTHONUTF8=1"
        raise UserError(line) from error


def check_ending(path: str, ending: str, flag: str) -> None:
    """Raises a UserError unless the path is local and has the ending; nothing else is written over."""
    if "://" in path or not path.lower().endswith(ending):
        raise UserError(f"{flag} must be a local file that ends in {ending}, got {path}")


def folder(path: str | os.PathLike[str]) -> epath.Path:
    """A local folder, made absolute, or one under gs://; made if it is not there.

    Raises:
      UserError: it cannot be made or reached: no library for gs://, no permission.
    """
    place = epath.Path(path if "://" in str(path) else os.path.abspath(path))
    try:
        place.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        raise UserError(
            f'{path} needs a library for Google Storage: pip install "bitdance_jax[gcs]"'
        ) from error
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from error
    return place


def _remove_if_there(file: Path) -> None:
    with contextlib.suppress(OSError):  # Windows removes no open file.
        file.unlink()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
