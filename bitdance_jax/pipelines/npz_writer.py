"""Writes samples for an evaluation suite to one .npz, batch by batch, so that it can be resumed.

The file has the format of ADM's sampler: `arr_0`, uint8 [N, H, W, 3], and `arr_1`, int64 labels
[N], not compressed. While it is incomplete it is named OUT.npz.partial, and OUT.npz.partial.json
records how many images are on the disk, their checksum, and the request. This record is written
after each batch has reached the disk. The same command resumes from there. A finished file has the
request in its zip comment. Both are read completely first, and refused if the checksums do not
match.
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
from bitdance_jax.errors import FileError, ResourceError, UserError
from bitdance_jax.io import readers
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.io.paths import check_suffix


_REGENERATE = "generate it again with overwrite=True"

BLOCK = 1 << 24
"""Bytes of one step of a checksum."""


@dataclass(frozen=True)
class Record:
    """The content of OUT.npz.partial.json.

    Attributes:
      request: JSON-ready data.
      rows: number of rows that are on the disk.
      checksum: their CRC-32.
    """

    request: dict[str, Any]
    rows: int
    checksum: int


class NpzWriter:
    """Writes the rows of `arr_0` in order, in place.

    Attributes:
      rows: number of rows that are on the disk.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        request: dict[str, Any],
        shape: tuple[int, int, int, int],
    ) -> None:
        """Does not write anything before `open`.

        Args:
          path: the .npz.
          request: JSON-ready data. A file of another request is not resumed.
          shape: of `arr_0`.

        Raises:
          ConfigError: `path` is remote or has another suffix.
        """
        check_suffix(str(path), ".npz", "npz")
        self._path = Path(path)
        self._request = request
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._record_file = self._path.with_name(self._path.name + ".partial.json")
        self._total = shape[0]
        self._row_bytes = int(np.prod(shape[1:]))

        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        self._header = header.getvalue()
        self._member = _member("arr_0.npy")
        self._member.file_size = len(self._header) + self._total * self._row_bytes
        self._member.compress_size = self._member.file_size
        self._first_row = len(self._member.FileHeader(zip64=True)) + len(self._header)
        self._file: io.BufferedRandom | None = None
        self._lock = contextlib.ExitStack()
        self.rows = 0
        self._checksum = zlib.crc32(self._header)

    def open(self, overwrite: bool = False) -> int:
        """Resumes or starts the file.

        Returns:
          the number of finished rows: all of them if the .npz exists.

        Raises:
          FileError: the file is of another request, damaged, being written by another process, or
            cannot be written.
          ResourceError: the disk has too little space.
        """
        self._lock.enter_context(writer_lock(self._path, is_folder=False))
        with self._write_errors():
            if self._path.exists() and not overwrite:
                readers.check_file(self._path)
                self._check_request(self._path, _finished_request(self._path))
                self._check_finished()
                # A writer that was killed after renaming the file has left its record.
                self._record_file.unlink(missing_ok=True)
                self.rows = self._total
                return self.rows
            self._read_record(overwrite)
            needed = (self._total - self.rows) * self._row_bytes
            free = shutil.disk_usage(self._path.parent).free
            if needed > free:
                raise ResourceError(
                    f"{self._path} needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are"
                    " free; free some space"
                )
            self._file = open(self._partial, "r+b" if self.rows else "w+b")
        return self.rows

    def append(self, images: UInt8[np.ndarray, "B H W 3"]) -> int:
        """Adds rows, and returns the number of all rows.

        After it returns, they survive a kill and a loss of power.
        """
        assert self._file is not None
        data = np.ascontiguousarray(images).data
        with self._write_errors():
            self._file.seek(self._end)
            self._file.write(data)
            _sync(self._file)
            self.rows += len(images)
            self._checksum = zlib.crc32(data, self._checksum)
            self._write_record()
        return self.rows

    def finish(self, labels: Int64[np.ndarray, "N"]) -> int:
        """Completes the .npz and renames it, if it is not finished already. Returns its rows."""
        if self._file is None:
            return self.rows
        assert self.rows == self._total, "rows are missing"
        array = io.BytesIO()
        np.lib.format.write_array(array, labels, (1, 0))
        with self._write_errors():
            # ZIP64, because the sizes may exceed 4 GB. Small files have its fields too, so that the
            # rows have the same position.
            self._member.CRC = self._checksum
            self._file.seek(0)
            self._file.write(self._member.FileHeader(zip64=True) + self._header)
            self._file.truncate(self._end)  # A kill may have left a partial directory.
            self._file.seek(self._end)
            with zipfile.ZipFile(self._file, "w") as archive:  # It writes from here on.
                archive.filelist.append(self._member)
                archive.writestr(_member("arr_1.npy"), array.getvalue())
                archive.comment = json.dumps(self._request).encode()
            _sync(self._file)
            os.replace(self._partial, self._path)
            self._record_file.unlink(missing_ok=True)
        return self.rows

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                # Closing writes the buffer, which fails again on a full disk.
                with contextlib.suppress(OSError):
                    self._file.close()

    @property
    def _end(self) -> int:
        """Position of the next row in the file."""
        return self._first_row + self.rows * self._row_bytes

    def _read_record(self, overwrite: bool) -> None:
        """Reads the number of finished rows and their checksum, and compares them with the file."""
        if not (self._record_file.exists() and self._partial.exists()):
            return
        try:
            record: Record = readers.read_json(self._record_file, Record, fix=_REGENERATE)
            self._check_request(self._partial, record.request)
            self._check_rows(record.rows, record.checksum)
        except UserError:
            if not overwrite:
                raise
            return
        self.rows = record.rows
        self._checksum = record.checksum

    def _check_rows(self, rows: int, checksum: int) -> None:
        """Raises a FileError if the file does not have so many rows with this checksum."""
        found = zlib.crc32(self._header)
        left = rows * self._row_bytes
        if not 0 <= rows <= self._total or self._partial.stat().st_size < self._first_row + left:
            raise FileError(
                f"{self._partial} does not have the {rows} images that {self._record_file.name}"
                f" records; {_REGENERATE}",
                self._partial,
            )
        with open(self._partial, "rb") as file:
            file.seek(self._first_row)
            while left and (block := file.read(min(left, BLOCK))):
                found = zlib.crc32(block, found)
                left -= len(block)
        if left or found != checksum:
            raise FileError(
                f"{self._partial} is damaged: its {rows} images are not those that were written;"
                f" {_REGENERATE}",
                self._partial,
            )

    def _check_finished(self) -> None:
        """Raises a FileError if a finished file is damaged."""
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open("arr_0.npy") as images:
                wrong = archive.testzip()
                labels = np.lib.format.read_array(
                    io.BytesIO(archive.read("arr_1.npy")), allow_pickle=False
                )
                header = images.read(len(self._header))
                size = archive.getinfo("arr_0.npy").file_size
        except Exception as error:  # zipfile raises many types for a damaged file.
            line = f"{self._path} is damaged ({error}); {_REGENERATE}"
            raise FileError(line, self._path) from error
        if (
            wrong
            or header != self._header
            or size != self._member.file_size
            or labels.shape != (self._total,)
        ):
            line = f"{self._path} is damaged ({wrong or 'sizes'}); {_REGENERATE}"
            raise FileError(line, self._path)

    def _write_record(self) -> None:
        temporary = self._record_file.with_name(self._record_file.name + ".new")
        with open(temporary, "w") as file:
            json.dump(asdict(Record(self._request, self.rows, self._checksum)), file)
            _sync(file)
        os.replace(temporary, self._record_file)

    def _check_request(self, path: Path, found: dict[str, Any] | None) -> None:
        if found is None:
            raise FileError(
                f"{path} exists and was not written by this command; "
                "choose another name or overwrite=True",
                path,
            )
        for name, expected in _flat(self._request).items():
            value = _flat(found).get(name, _DEFAULTS.get(name))
            if value != expected:
                raise FileError(
                    f"{path} holds other samples ({name} {value}, asked for {expected}); "
                    "choose another name or overwrite=True",
                    path,
                )

    @contextlib.contextmanager
    def _write_errors(self) -> Any:
        try:
            yield
        except OSError as error:
            hint = f"; the same command resumes after {self.rows} images" if self.rows else ""
            line = f"cannot write {self._path}: {error.strerror or error}{hint}"
            raise FileError(line, self._path) from error


def _member(name: str) -> zipfile.ZipInfo:
    """A zip entry without a date."""
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
    except readers.ZIP_ERRORS:  # These include ValueError, and so UserError.
        return None
    return request


_DEFAULTS = to_dict(SamplerConfig())
"""Values of settings that files of earlier versions do not have."""


def _flat(request: dict[str, Any]) -> dict[str, Any]:
    nested = {
        name: value
        for group in request.values()
        if isinstance(group, dict)
        for name, value in group.items()
    }
    return {name: value for name, value in request.items() if not isinstance(value, dict)} | nested


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
