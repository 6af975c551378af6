"""Writes files and folders atomically: readers see the old content or the new, never a part."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from bitdance_jax.errors import FileError, ResourceError, UserError
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.io.paths import folder_made


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str], kind: str = "") -> Iterator[Path]:
    """Yields a temporary path beside `path`, which is renamed to `path` when the block ends.

    If the block fails, the temporary file is removed. The folder is made if it is missing, and
    removed again if the block fails. Where `path` is a symbolic link, the file it points to is
    replaced.

    Args:
      path: the file.
      kind: a prefix of the path in the error message, for example "the image ".

    Raises:
      FileError: the file cannot be written (permissions, full disk).
    """
    target = Path(os.path.realpath(path))
    # Random, because processes on several hosts, or in containers with equal process ids, may share
    # the folder.
    temporary = target.with_name(f".bitdance_jax.{secrets.token_hex(8)}")
    with write_errors(f"{kind}{path}"):
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise FileError(f"cannot write {kind}{path}: it is a device or a pipe; name a file")
        with folder_made(target.parent):
            try:
                yield temporary
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: str | os.PathLike[str], *, recursive: bool = True) -> None:
    """Removes the files that killed processes left behind in `replace_file`."""
    find = Path(folder).rglob if recursive else Path(folder).glob
    for path in find(".bitdance_jax.*"):
        if re.fullmatch(r"\.bitdance_jax\.[0-9a-f]{16}", path.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(folder: str | os.PathLike[str], num_bytes: int = 0) -> Iterator[Path]:
    """Yields a new folder beside `folder`, which is renamed to `folder` when the block ends.

    If the block fails, the new folder is removed. An existing `folder` is removed at the end; the
    caller checks beforehand that it may be. If the process is killed, the old or the new folder is
    complete, at its path or where `recover_folder` finds it. Where `folder` is a symbolic link, the
    folder it points to is replaced.

    Args:
      folder: the folder; its parents are made.
      num_bytes: size of what the block will write.

    Raises:
      FileError: it cannot be written, or another process is writing it.
      ResourceError: the disk has too little space.
    """
    target = Path(os.path.realpath(folder))
    with write_errors(str(folder)):
        if os.path.ismount(target):
            raise FileError(f"{folder} is a disk of its own; choose a folder on it")
        new, old, discarded = _siblings(target)
        with writer_lock(target, is_folder=False):
            recover_folder(target)
            shutil.rmtree(new, ignore_errors=True)
            if target.exists():
                _discard(old, discarded)
            try:
                new.mkdir()
                _check_space(folder, new, num_bytes)
                yield new
                _swap(target, new, old)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            _discard(old, discarded)


def recover_folder(target: Path) -> None:
    """Restores a folder whose `replace_folder` was killed between its two renames.

    The new folder is complete in that case. `target` must not be a symbolic link.
    """
    if not target.name:  # the root of a disk
        return
    new, old, _ = _siblings(target)
    # Another process may have recovered it first, this one may not have the permission, or the
    # names are too long for the file system.
    with contextlib.suppress(OSError):
        if old.exists() and not target.exists():
            os.rename(new if new.exists() else old, target)


@contextlib.contextmanager
def write_errors(what: str) -> Iterator[None]:
    """Turns errors of the system and of TensorStore into one line that says why writing failed.

    Raises:
      FileError: `what` cannot be written (permissions, full disk).
    """
    try:
        yield
    except Exception as error:
        # TensorStore puts the system's error number into exceptions of many types.
        code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
        if isinstance(error, UserError) or not (isinstance(error, OSError) or code):
            raise
        reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or error
        raise FileError(f"cannot write {what}: {reason}") from error


def _siblings(target: Path) -> tuple[Path, Path, Path]:
    """The folder being written, the one it replaces, and the latter while it is being removed."""
    prefix = f".{target.name}.bitdance_jax_"
    return (
        target.with_name(prefix + "new"),
        target.with_name(prefix + "old"),
        target.with_name(prefix + "gone"),
    )


def _swap(target: Path, new: Path, old: Path) -> None:
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        if not target.exists():
            os.rename(old, target)
            raise
        if new.exists():  # Otherwise a reader that found no `target` has already recovered it.
            raise


def _discard(old: Path, discarded: Path) -> None:
    """Removes a replaced folder. It is renamed first: `recover_folder` must not find half of it."""
    shutil.rmtree(discarded, ignore_errors=True)
    if old.exists():
        os.rename(old, discarded)
        shutil.rmtree(discarded, ignore_errors=True)


def _check_space(folder: str | os.PathLike[str], new: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(new).free
    if free < num_bytes:
        raise ResourceError(
            f"{folder} needs {num_bytes / 2**20:,.1f} MiB, and its disk has"
            f" {free / 2**20:,.1f} MiB free; free some space"
        )
