"""Checks that all processes were started with the same configuration and data."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from bitdance_jax.errors import UserError


# Paths may differ between hosts, but either all processes are given one or none is.
_PATHS = {
    "checkpoint",
    "checkpoints",
    "compilation_cache",
    "dpg",
    "geneval",
    "held_out",
    "init",
    "npz",
    "oneig",
    "out",
    "path",
    "paths",
    "prompts",
    "text_tokenizer",
    "tiif",
    "tokenizer",
    "workdir",
}
# The number of loader processes does not change the data.
_MAY_DIFFER = {"workers"}


def check_same_config(config: Any, **values: Any) -> None:
    """`check_same` for a dataclass, with all its nested fields, and for further values.

    Paths, the number of workers and `hosts` may differ.

    Raises:
      UserError: in all processes; it names the fields that differ.
    """
    fields = traverse_util.flatten_dict(dataclasses.asdict(config), sep=".")
    compared = {}
    for name, value in fields.items():
        last = name.rsplit(".", 1)[-1]
        if name.startswith("hosts.") or last in _MAY_DIFFER:
            continue
        compared[name] = ("given" if value is not None else None) if last in _PATHS else value
    check_same(compared | values)


def check_same(values: Mapping[str, Any]) -> None:
    """Compares named JSON-ready values between all processes. Every process calls this.

    Raises:
      UserError: in all processes; it names the values that differ.
    """
    if jax.process_count() == 1:
        return
    gathered = _gather({name: json.dumps(value, sort_keys=True) for name, value in values.items()})
    first = gathered[0]
    for process_id, other in enumerate(gathered):
        names = sorted(first.keys() | other.keys())
        differences = [name for name in names if first.get(name) != other.get(name)]
        if differences:
            details = "; ".join(
                f"{name} is {first.get(name)} and {other.get(name)}" for name in differences
            )
            raise UserError(
                f"processes 0 and {process_id} were started differently ({details}); "
                "start all with the same command"
            )


def fingerprint(arrays: Any) -> int:
    """A checksum of all arrays of a tree, for `check_same`; 0 if there is only one process.

    Of arrays that are not in memory (`io.orbax_weights.StoredArray`), it is that of the first row.
    """
    if jax.process_count() == 1:
        return 0
    checksum = 0
    for array in jax.tree.leaves(arrays):
        if not isinstance(array, np.ndarray | jax.Array):
            array = array[(0,) * (len(array.shape) - 1)]
        checksum = zlib.crc32(np.asarray(array).tobytes(), checksum)
    return checksum


def _gather(values: dict[str, str]) -> list[dict[str, str]]:
    """The values of every process, by process id."""
    text = np.frombuffer(json.dumps(values).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
