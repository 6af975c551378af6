"""Local folders that are there whole or not at all, whatever kills the process that writes them."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bitdance_jax.errors import UserError
from bitdance_jax.io.files import only_writer, write_errors


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str], needed: int = 0) -> Iterator[Path]:
    """Gives a new folder beside `folder`, which takes its place when the block ends, or goes if it fails.

    What is in its place is removed then: whether it may be is for the caller to ask. Whenever the
    process is killed, one of the two is whole, in its place or where `recover` finds it. A symbolic link
    stays one, and the folder behind it is replaced.

    Args:
      folder: the place; the folders that it lies in are made.
      needed: bytes that the block will write.

    Raises:
      UserError: it cannot be written, so many bytes are not free, or another process is writing it.
    """
    place = Path(os.path.realpath(folder))
    with write_errors(str(folder)):
        if os.path.ismount(place):
            raise UserError(f"{folder} is a disk of its own; give a folder on it")
        new, old, gone = _beside(place)
        with only_writer(place, is_folder=False):
            recover(place)
            shutil.rmtree(new, ignore_errors=True)
            if place.exists():
                _discard(old, gone)
            try:
                new.mkdir()
                _check_space(folder, new, needed)
                yield new
                _swap(place, new, old)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            _discard(old, gone)


def recover(place: Path) -> None:
    """Puts back what `writing` was killed at between its two renames, if it was; `place` is no symbolic link.

    The new folder is whole then, for it was to take the place of the old one.
    """
    if not place.name:  # the root of a disk
        return
    new, old, _ = _beside(place)
    if old.exists() and not place.exists():
        with contextlib.suppress(
            OSError
        ):  # another process was first, or this one may not write here
            os.rename(new if new.exists() else old, place)


def _beside(place: Path) -> tuple[Path, Path, Path]:
    """The folder that is being written, the one that it replaces, and that one while it is removed."""
    hidden = f".{place.name}.bitdance_jax_"
    return (
        place.with_name(hidden + "new"),
        place.with_name(hidden + "old"),
        place.with_name(hidden + "gone"),
    )


def _swap(place: Path, new: Path, old: Path) -> None:
    if place.exists():
        os.rename(place, old)
    try:
        os.rename(new, place)
    except OSError:
        if not place.exists():
            os.rename(old, place)
            raise
        if new.exists():  # or else a reader has put it there, to which it was missing
            raise


def _discard(old: Path, gone: Path) -> None:
    """Removes what has been replaced; renamed before, so that `recover` takes no half of it for whole."""
    shutil.rmtree(gone, ignore_errors=True)
    if old.exists():
        os.rename(old, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _check_space(folder: str | os.PathLike[str], place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        there = f"its disk has {free / 2**20:,.1f} MiB left"
        raise UserError(f"{folder} needs {needed / 2**20:,.1f} MiB, and {there}; make room there")
