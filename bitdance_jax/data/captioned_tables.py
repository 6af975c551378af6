"""Captioned images in Parquet files, and in datasets that Hugging Face's `datasets` saved."""

import contextlib
import functools
import importlib.util
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from bitdance_jax.data.captioned import (
    NO_CAPTION,
    TEXT,
    CaptionedImage,
    Skips,
    require_captions,
    require_field,
)
from bitdance_jax.data.patterns import expand
from bitdance_jax.errors import ConfigError, FileError, UserError
from bitdance_jax.io import readers
from bitdance_jax.io.image_files import DamagedImage, decode_image, load_image
from bitdance_jax.io.readers import reading


SUFFIX = ".parquet"
STATE = "state.json"
SPLITS = "dataset_dict.json"
CACHED_GROUPS = 4
"""Groups of rows of Parquet files that are kept in memory."""


class TableSource:
    """Rows of tables with a column of images and one of captions.

    The image column is the one named "image", or else the only one of its kind: encoded images as
    bytes, or as structs of `bytes` and `path`, as Hugging Face's datasets have them. A caption is a
    string or a list of strings. Parquet files are decompressed by groups of rows, as they were
    written, so that reading rows at random is slow where groups are large; a dataset saved to disk
    is mapped into memory.

    Args:
      path: Parquet files (`patterns.expand`), or a folder that `Dataset.save_to_disk` wrote.
      caption: column of the captions; None: "text".
      split_field: a column whose values become `splits`.

    Raises:
      FileError: a file is missing or damaged, or there are no captioned images.
      ConfigError: there are no such columns, or no captions in theirs.
      UserError: pyarrow is not installed.
    """

    def __init__(
        self, path: str, caption: str | None = None, split_field: str | None = None
    ) -> None:
        self.location = path
        self.skipped = Skips()
        self.splits: Sequence[str] | None = None
        self._caption = caption or TEXT
        self._tables: _SavedTables | _ParquetTables = (
            _open_saved(path) if is_saved_dataset(path) else _open_parquet(path)
        )
        schema = self._tables.schema
        require_field(schema.names, self._caption, path)
        self._image = _image_column(schema, path)
        captions = self._tables.column(self._caption)
        self._rows = self._usable(captions)
        if not len(self._rows):
            raise FileError(f"{path} has no captioned images; {self.skipped}", path)
        if split_field is not None:
            require_field(schema.names, split_field, path)
            values = self._tables.column(split_field).to_pylist()
            self.splits = [str(values[row]) for row in self._rows.tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> CaptionedImage:
        row = int(self._rows[index])
        name = f"row {row} of {self.location}"
        record = self._tables.row(row, (self._image, self._caption))
        captions = require_captions(record[self._caption], name)
        value = record[self._image]
        if isinstance(value, dict):
            data, file = value.get("bytes"), value.get("path")
            if data is None and file:
                return CaptionedImage(captions, load_image(file))
            value = data
        if value is None:
            raise DamagedImage(f"{name} has no image", name)
        return CaptionedImage(captions, decode_image(io.BytesIO(value), name))

    def captions_of(self, index: int) -> tuple[str, ...]:
        row = int(self._rows[index])
        record = self._tables.row(row, (self._caption,))
        return require_captions(record[self._caption], f"row {row} of {self.location}")

    def _usable(self, captions: Any) -> np.ndarray:
        """The rows that have a caption; the others are counted."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if pa.types.is_dictionary(captions.type):
            captions = captions.cast(captions.type.value_type)
        is_list = pa.types.is_list(captions.type) or pa.types.is_large_list(captions.type)
        kind = captions.type.value_type if is_list else captions.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(
                f"the column {self._caption!r} of {self.location} has {captions.type}, and captions"
                " are strings or lists of strings; data.captions names another column",
                "data.captions",
            )
        length = pc.list_value_length(captions) if is_list else pc.utf8_length(captions)
        has_caption = np.asarray(pc.fill_null(pc.greater(length, 0), False))
        for row in np.flatnonzero(~has_caption).tolist():
            self.skipped.add(NO_CAPTION, f"row {row}")
        return np.flatnonzero(has_caption)


def is_saved_dataset(path: str) -> bool:
    """Whether a folder is one that `datasets` saved."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (STATE, SPLITS))


def _image_column(schema: Any, where: str) -> str:
    """The name of the column of images."""
    import pyarrow.types as types

    def is_image(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind)

    found = [field.name for field in schema if is_image(field.type)]
    name = "image" if "image" in found else found[0] if len(found) == 1 else None
    if name is None:
        raise ConfigError(
            f"{where} has no column 'image' of encoded images; its columns are:"
            f" {', '.join(schema.names)}"
        )
    return name


class _SavedTables:
    """The Arrow files of a dataset saved to disk, mapped into memory."""

    def __init__(self, files: list[str]) -> None:
        self._files = files
        self._open()

    @property
    def schema(self) -> Any:
        return self._table.schema

    def column(self, name: str) -> Any:
        return self._table.column(name)

    def row(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        return {name: self._table.column(name)[index].as_py() for name in names}

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        import pyarrow as pa

        tables = []
        for file in self._files:
            readers.check_file(file)
            try:
                tables.append(pa.ipc.open_stream(pa.memory_map(file)).read_all())
            except (pa.ArrowException, OSError) as error:
                raise _damaged(file, error) from error
        self._table = pa.concat_tables(tables)


class _ParquetTables:
    """Parquet files, of which groups of rows are read when they are needed."""

    def __init__(self, files: list[str]) -> None:
        self._files = files
        self._groups: list[tuple[int, int]] = []
        counts = []
        for number, path in enumerate(files):
            with _parquet(path) as file:
                if number == 0:
                    self.schema = file.schema_arrow
                elif file.schema_arrow.names != self.schema.names:
                    raise FileError(f"{path} has other columns than {files[0]}", path)
                for group in range(file.num_row_groups):
                    self._groups.append((number, group))
                    counts.append(file.metadata.row_group(group).num_rows)
        self._ends = np.cumsum(counts, dtype=np.int64)

    def column(self, name: str) -> Any:
        import pyarrow as pa

        parts = []
        for path in self._files:
            with _parquet(path) as file:
                parts += file.read([name]).column(0).chunks
        return pa.chunked_array(parts, self.schema.field(name).type)

    def row(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        file, group = self._groups[number]
        within = index - (int(self._ends[number - 1]) if number else 0)
        table = _row_group(self._files[file], group, tuple(names))
        return {name: table.column(name)[within].as_py() for name in names}


@functools.lru_cache(maxsize=CACHED_GROUPS)
def _row_group(path: str, group: int, names: tuple[str, ...]) -> Any:
    with _parquet(path) as file:
        return file.read_row_group(group, list(names))


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """An open Parquet file. Errors in the block are a FileError about it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path), epath.Path(path).open("rb") as stream:
        try:
            with pq.ParquetFile(stream) as file:
                yield file
        except pa.ArrowException as error:
            raise _damaged(path, error) from error


_Tables = _SavedTables | _ParquetTables


def _open_parquet(path: str) -> _Tables:
    _require_pyarrow()
    return _ParquetTables(expand(path, SUFFIX))


def _open_saved(path: str) -> _Tables:
    _require_pyarrow()
    root = Path(path)
    if (root / SPLITS).exists():
        names = readers.read_json(root / SPLITS).get("splits", [])
        folders = ", ".join(str(root / str(name)) for name in names)
        raise FileError(f"{path} has several splits; name one of them: {folders}", path)
    state = readers.read_json(root / STATE)
    entries = state.get("_data_files", [])
    if state.get("_indices_files") or not entries:
        raise FileError(f"{path} has another form; save it again: Dataset.save_to_disk", path)
    return _SavedTables([str(root / str(entry["filename"])) for entry in entries])


def _require_pyarrow() -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "Parquet files and saved datasets need another package: pip install"
            " 'bitdance_jax[parquet]'"
        )


def _damaged(path: str, error: Exception) -> FileError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return FileError(f"{path} is damaged ({reason}); fetch or write it again", path)
