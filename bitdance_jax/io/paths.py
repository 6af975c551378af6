"""Checks paths, and makes folders, on a local disk or under gs://."""

import importlib.util
import os

from etils import epath

from bitdance_jax.errors import ConfigError, FileError


PathLike = str | os.PathLike[str]

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
    """Raises a FileError for a path with a NUL or not UTF-8, which no library here can open."""
    if "\0" in str(path):
        raise FileError(f"{str(path)!r} cannot be the name of a file")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise FileError(f"the name {path} is not UTF-8; rename it, or set PYTHONUTF8=1") from error


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
