"""Samples for an evaluation suite in one .npz, written in place, so that memory stays flat and a kill loses nothing.

The file is what ADM's sampler writes: `arr_0`, uint8 [N, H, W, 3], and `arr_1`, int64 labels [N], not compressed. While it grows it is
OUT.npz.partial, with the journal OUT.npz.partial.json beside it: how many images are safely on the disk, their checksum, and what was
asked for. A batch counts once the journal says so, which is written after the batch has reached the disk. The same command goes on from
there; a finished file keeps what was asked for as its zip comment. Either is read whole first, and
refused where its checksums say that it was altered.
"""

import contextlib
import io
import json
import os
import shutil
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from bitdance_jax.config import SamplerConfig, to_dict
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.io import readers
from bitdance_jax.io.locks import writer_lock


_ANEW = "generate it again with overwrite=True"

BLOCK = 1 << 24
"""Bytes that a checksum is computed of at a time."""


@dataclass(frozen=True)
class Journal:
    """What is known of a file in progress: what was asked for, how many rows there are, and their checksum."""

    request: dict[str, Any]
    rows: int
    checksum: int


class NpzWriter:
    """Writes the rows of `arr_0` in order, in place.

    Attributes:
      rows: how many are safely on the disk.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        request: dict[str, Any],
        shape: tuple[int, int, int, int],
    ) -> None:
        """Touches nothing yet: `open` does.

        Args:
          path: the .npz.
          request: JSON-ready data; a file begun with another one is not gone on with.
          shape: of `arr_0`.
        """
        self._path, self._request = Path(path), request
        if self._path.suffix != ".npz" or "://" in str(path):
            raise UserError(f"the samples go into a local file that ends in .npz, got {path}")
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._journal = self._path.with_name(self._path.name + ".partial.json")
        self._total, self._row_bytes = shape[0], int(np.prod(shape[1:]))

        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        self._header = header.getvalue()
        self._member = _member("arr_0.npy")
        self._member.file_size = self._member.compress_size = (
            len(self._header) + self._total * self._row_bytes
        )
        self._first_row = len(self._member.FileHeader(zip64=True)) + len(self._header)
        self._file: io.BufferedRandom | None = None
        self._lock = contextlib.ExitStack()
        self.rows, self._checksum = 0, zlib.crc32(self._header)

    def open(self, overwrite: bool = False) -> int:
        """Finds what is there already, or begins; returns the rows that are finished, all of them if the .npz itself is.

        Raises:
          UserError: another request's file, a damaged one, one that another process is writing, or none
            can be written.
        """
        self._lock.enter_context(writer_lock(self._path, is_folder=False))
        with self._one_line_errors():
            if self._path.exists() and not overwrite:
                readers.check_file(self._path)
                self._check_request(self._path, _finished_request(self._path))
                self._check_finished()
                self._journal.unlink(
                    missing_ok=True
                )  # of a writer that was killed right after its end
                self.rows = self._total
                return self.rows
            self._read_journal(overwrite)
            needed, free = (
                (self._total - self.rows) * self._row_bytes,
                shutil.disk_usage(self._path.parent).free,
            )
            if needed > free:
                raise UserError(
                    f"{self._path} needs {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free; make room there"
                )
            self._file = open(self._partial, "r+b" if self.rows else "w+b")
        return self.rows

    def append(self, images: UInt8[np.ndarray, "B H W 3"]) -> int:
        """Adds rows; once it returns, their number, they outlive a kill and a loss of power."""
        assert self._file is not None
        data = np.ascontiguousarray(images).data
        with self._one_line_errors():
            self._file.seek(self._end)
            self._file.write(data)
            _to_disk(self._file)
            self.rows, self._checksum = self.rows + len(images), zlib.crc32(data, self._checksum)
            self._write_journal()
        return self.rows

    def finish(self, labels: Int64[np.ndarray, "N"]) -> int:
        """Makes the whole file an .npz and puts it in its place; returns its rows. Does nothing if it is there already."""
        if self._file is None:
            return self.rows
        assert self.rows == self._total, "rows are missing"
        array = io.BytesIO()
        np.lib.format.write_array(array, labels, (1, 0))
        with self._one_line_errors():
            # ZIP64: the sizes may pass 4 GB. Its fields are there in small files too, which keeps the rows in one place.
            self._member.CRC = self._checksum
            self._file.seek(0)
            self._file.write(self._member.FileHeader(zip64=True) + self._header)
            self._file.truncate(self._end)  # a kill may have left a directory that is not whole
            self._file.seek(self._end)
            with zipfile.ZipFile(self._file, "w") as archive:  # writes from here on
                archive.filelist.append(self._member)
                archive.writestr(_member("arr_1.npy"), array.getvalue())
                archive.comment = json.dumps(self._request).encode()
            _to_disk(self._file)
            os.replace(self._partial, self._path)
            self._journal.unlink(missing_ok=True)
        return self.rows

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(
                    OSError
                ):  # of a full disk, once more, for what is still buffered
                    self._file.close()

    @property
    def _end(self) -> int:
        """Place of the next row in the file."""
        return self._first_row + self.rows * self._row_bytes

    def _read_journal(self, overwrite: bool) -> None:
        """Takes what the journal says of the rows that are there, if that is true of them."""
        if not (self._journal.exists() and self._partial.exists()):
            return
        try:
            journal: Journal = readers.read_json(self._journal, Journal, fix=_ANEW)
            self._check_request(self._partial, journal.request)
            self._check_rows(journal.rows, journal.checksum)
        except UserError:
            if not overwrite:
                raise
            return
        self.rows, self._checksum = journal.rows, journal.checksum

    def _check_rows(self, rows: int, checksum: int) -> None:
        """Raises a UserError if these are not the checksum of so many rows: of a flipped bit, a hole that a loss of power left."""
        found, left = zlib.crc32(self._header), rows * self._row_bytes
        if not 0 <= rows <= self._total or self._partial.stat().st_size < self._first_row + left:
            raise UserError(
                f"{self._partial} does not have the {rows} images that {self._journal.name} says; {_ANEW}"
            )
        with open(self._partial, "rb") as file:
            file.seek(self._first_row)
            while left and (block := file.read(min(left, BLOCK))):
                found, left = zlib.crc32(block, found), left - len(block)
        if left or found != checksum:
            raise UserError(
                f"{self._partial} is damaged: its {rows} images are not those that were written; {_ANEW}"
            )

    def _check_finished(self) -> None:
        """Raises a UserError if a finished file cannot be read, or what is in it is not what was written."""
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open("arr_0.npy") as images:
                wrong = archive.testzip()
                labels = np.lib.format.read_array(
                    io.BytesIO(archive.read("arr_1.npy")), allow_pickle=False
                )
                header, size = (
                    images.read(len(self._header)),
                    archive.getinfo("arr_0.npy").file_size,
                )
        except Exception as error:  # zipfile raises many types for a damaged file
            raise UserError(f"{self._path} is damaged ({error}); {_ANEW}") from error
        if (
            wrong
            or header != self._header
            or size != self._member.file_size
            or labels.shape != (self._total,)
        ):
            raise UserError(f"{self._path} is damaged ({wrong or 'sizes'}); {_ANEW}")

    def _write_journal(self) -> None:
        temporary = self._journal.with_name(self._journal.name + ".new")
        with open(temporary, "w") as file:
            json.dump(asdict(Journal(self._request, self.rows, self._checksum)), file)
            _to_disk(file)
        os.replace(temporary, self._journal)

    def _check_request(self, path: Path, there: dict[str, Any] | None) -> None:
        if there is None:
            raise FileError(
                f"{path} exists and was not written by this command; "
                "choose another name or overwrite=True",
                path,
            )
        for name, here in _flat(self._request).items():
            other = _flat(there).get(name, _DEFAULTS.get(name))
            if other != here:
                raise FileError(
                    f"{path} holds other samples ({name} {other}, asked for {here}); "
                    "choose another name or overwrite=True",
                    path,
                )

    @contextlib.contextmanager
    def _one_line_errors(self) -> Any:
        try:
            yield
        except OSError as error:
            kept = (
                f"; {self.rows} finished images are kept, and the same command goes on"
                if self.rows
                else ""
            )
            raise UserError(
                f"cannot write {self._path}: {error.strerror or error}{kept}"
            ) from error


def _member(name: str) -> zipfile.ZipInfo:
    """An entry whose bytes depend on nothing but its contents."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o644 << 16
    info.CRC = info.header_offset = 0
    return info


def _finished_request(path: Path) -> dict[str, Any] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            request: dict[str, Any] = readers.decode_json(archive.comment, where=str(path))
    except OSError:
        raise
    except readers.ZIP_ERRORS:  # a UserError is a ValueError
        return None
    return request


_DEFAULTS = to_dict(SamplerConfig())
"""What earlier versions did, whose files do not say it."""


def _flat(request: dict[str, Any]) -> dict[str, Any]:
    nested = {
        name: value
        for group in request.values()
        if isinstance(group, dict)
        for name, value in group.items()
    }
    return {name: value for name, value in request.items() if not isinstance(value, dict)} | nested


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
