"""Fields of records that tell which of them are held out, such as "split"."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Bool, Int

from bitdance_jax.data.captioned import require_field
from bitdance_jax.data.records import Names
from bitdance_jax.data.tar_members import read_in_threads
from bitdance_jax.data.tar_shards import Shard
from bitdance_jax.errors import ConfigError


JSON = "json"

HELD_OUT_NAMES = ("held_out", "heldout", "validation", "val", "test")
"""Values of the field that mark a held-out image, whatever their case."""


def held_out_rows(splits: Sequence[str], location: str) -> Bool[np.ndarray, "N"]:
    """Which records are held out.

    Args:
      splits: the value of each record's field.
      location: of the records, for messages.

    Raises:
      ConfigError: none, or all of them.
    """
    rows = np.array([split.lower() in HELD_OUT_NAMES for split in splits], bool)
    if not rows.any() or rows.all():
        values = ", ".join(sorted(set(splits))[:10])
        raise ConfigError(
            f"data.held_out_field must mark some images of {location}, not all:"
            f" {', '.join(HELD_OUT_NAMES)}; its values are: {values}",
            "data.held_out_field",
        )
    return rows


def read_splits(
    shards: Sequence[Shard], numbers: Int[np.ndarray, "N"], names: Names, field: str
) -> list[str]:
    """The values of a field of the .json of WebDataset's samples, "" where there is none.

    Args:
      shards: the tars.
      numbers: which tar each sample is in, ascending.
      names: the sample's key and an extension.
      field: of its .json.

    Raises:
      ConfigError: no sample has the field.
      FileError: a tar cannot be read.
    """

    def part(row: int) -> Any:
        return shards[numbers[row]].samples[names[row].rsplit(".", 1)[0]].get(JSON)

    def read(rows: np.ndarray) -> list[str]:
        values = []
        with shards[numbers[rows[0]]].file.sequential() as stream:
            for row in rows.tolist():
                place = part(row)
                fields = {} if place is None else _fields(stream.read(*place))
                values.append(str(fields.get(field, "")))
        return values

    rows = np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers)) + 1)
    by_shard = read_in_threads(read, rows, f"reading {field}", "tar", delay=2)
    splits = [value for values in by_shard for value in values]
    if not any(splits):
        place, file = part(0), shards[numbers[0]].file
        first = {} if place is None else _fields(file.read(*place))
        require_field(first, field, f"{file.path}/{names[0]}'s .json")
    return splits


def _fields(data: bytes) -> dict[str, Any]:
    """The JSON object of a sample; empty if it is none. (Without the checks of `readers`, which
    take longer than reading it.)"""
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
