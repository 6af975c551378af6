"""Checks paths, and makes folders, on a local disk or under gs://."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from bitdance_jax.errors import ConfigError, FileError, short


PathLike = str | os.PathLike[str]

NAME_BYTES = 255
"""Of one file or folder, by the file systems of Linux and macOS."""

GCS_EXTRA = 'a library for Google Storage: pip install "bitdance_jax[gcs]"'


def is_remote(path: PathLike) -> bool:
    """Whether the path has a scheme, such as gs://."""
    return "://" in str(path)


def expand(path: str) -> str:
    """A path that a user gave, local or under gs://, with `~` replaced by the home folder.

    Raises:
      FileError: the path has another scheme, the library for Google Storage is not installed, or
        the path is not valid UTF-8.
    """
    check_path(path)
    scheme = path.partition("://")[0]
    if is_remote(path) and scheme != "gs":
        hint = ""
        if scheme == "hf":
            hint = " with: bitdance convert OWNER/REPOSITORY OUT"
        raise FileError(f"{path} is neither a local path nor one under gs://; fetch it first{hint}")
    if is_remote(path) and not any(
        importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")
    ):
        raise FileError(f"{path} needs {GCS_EXTRA}")
    return os.path.expanduser(path)


def check_path(path: PathLike) -> None:
    """Raises a FileError for a path that cannot be one: with a NUL or a name that is too long, or
    not UTF-8, which no library here can open."""
    if "\0" in str(path):
        raise FileError(f"{str(path)!r} cannot be the name of a file")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise FileError(f"the name {path} is not UTF-8; rename it, or set PYTHONUTF8=1") from error
    long = [name for name in str(path).split("/") if len(name.encode()) > NAME_BYTES]
    if long and not is_remote(path):
        size = len(long[0].encode())
        raise FileError(
            f"the name {short(long[0])} has {size} bytes, and a file's or folder's may have "
            f"{NAME_BYTES}; choose a shorter one"
        )


def local(path: PathLike) -> Path:
    """A local path that passes `check_path`."""
    check_path(path)
    return Path(path)


def check_checkpoint_path(path: PathLike) -> None:
    """Raises a FileError for a path with "[" or "*", which Orbax takes for patterns."""
    name = str(path) if is_remote(path) else os.path.realpath(path)
    check_path(name)
    for letter in "[*":
        if letter in name:
            raise FileError(
                f"no checkpoint can be written to {name} because of the {letter}; choose another"
            )


def check_suffix(path: str | None, suffix: str, field: str) -> None:
    """Checks a path that will be overwritten, if one is given.

    Raises:
      ConfigError: about the field: the path is not local or has another suffix.
    """
    if path is not None and (is_remote(path) or not path.lower().endswith(suffix)):
        line = f"{field} must be a local file that ends in {suffix}, got {path}"
        raise ConfigError(line, field)


@contextlib.contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """Makes a local folder with its parents; those made that are empty after the block are removed.

    Raises:
      OSError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


def user_cache() -> Path:
    """The user's folder for files that save time.

    $BITDANCE_CACHE; else bitdance_jax in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
      RuntimeError: it is in the home folder, which is not known.
    """
    if given := os.environ.get("BITDANCE_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "bitdance_jax"


def make_folder(path: PathLike) -> epath.Path:
    """Makes a folder if it does not exist. A local path becomes absolute.

    Raises:
      FileError: it cannot be made: no library for gs://, or no permission.
    """
    folder = epath.Path(path if is_remote(path) else os.path.abspath(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        raise FileError(f"{path} needs {GCS_EXTRA}") from error
    except OSError as error:
        raise FileError(f"cannot make the folder {path}: {error.strerror or error}") from error
    return folder
