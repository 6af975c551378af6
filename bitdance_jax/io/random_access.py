"""Reads parts of large files, local or under gs://."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from bitdance_jax.io import readers
from bitdance_jax.io.paths import PathLike, is_remote
from bitdance_jax.io.readers import reading


class RandomAccessFile:
    """A file that several threads and, pickled, processes read at any offset.

    Attributes:
      path: of the file, local or under gs://.
      size: in bytes.
      modified: time of its last modification, 0 if unknown.

    Raises:
      FileError: it is missing, or cannot be read.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = os.fspath(path)
        self._remote: tuple[Any, str] | None = None
        with reading(self.path):
            if is_remote(path):
                status = epath.Path(path).stat()
                self.size, self.modified = status.length, int(status.mtime)
            else:
                readers.check_file(path)
                local = os.stat(path)
                self.size, self.modified = local.st_size, local.st_mtime_ns

    def read(self, start: int, size: int) -> bytes:
        """The bytes from `start`, at most `size`.

        Raises:
          FileError: they cannot be read.
        """
        with reading(self.path):
            if not is_remote(self.path):
                with open(self.path, "rb", buffering=0) as file:
                    file.seek(start)
                    return file.read(size)
            return self._read_remote(start, size)

    @contextmanager
    def sequential(self) -> Iterator["SequentialReader"]:
        """For parts in ascending order that are near each other, such as all headers of a tar."""
        with reading(self.path), epath.Path(self.path).open("rb") as stream:
            yield SequentialReader(stream)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_remote": None}

    def _read_remote(self, start: int, size: int) -> bytes:
        if self._remote is None:
            with epath.Path(self.path).open("rb") as stream:
                # A stream of fsspec would read megabytes ahead.
                system = getattr(stream, "fs", None)
                self._remote = (system, getattr(stream, "path", ""))
        system, name = self._remote
        if system is not None:
            return system.cat_file(name, start=start, end=start + size)
        with epath.Path(self.path).open("rb") as stream:
            stream.seek(start)
            return stream.read(size)


class SequentialReader:
    """Reads parts of an open file; see `RandomAccessFile.sequential`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, start: int, size: int) -> bytes:
        """The bytes from `start`, at most `size`."""
        self._stream.seek(start)
        return self._stream.read(size)
