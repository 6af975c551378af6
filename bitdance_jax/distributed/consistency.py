"""Several processes do the same thing only if they were told the same: they compare before they begin."""

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


# Where things lie may differ between hosts, but not whether it is said. How many work at loading changes nothing.
_PLACES = {
    "checkpoint",
    "checkpoints",
    "compilation_cache",
    "dpg",
    "geneval",
    "held_out",
    "init",
    "npz",
    "out",
    "path",
    "tokenizer",
    "workdir",
}
_MAY_DIFFER = {"workers"}


def check_same_config(config: Any, **facts: Any) -> None:
    """`check_same` on the fields of a dataclass, those inside it included, and on further facts; places and `hosts` may differ.

    Raises:
      UserError: on all processes alike; it names the fields.
    """
    fields = traverse_util.flatten_dict(dataclasses.asdict(config), sep=".")
    compared = {}
    for name, value in fields.items():
        last = name.rsplit(".", 1)[-1]
        if name.startswith("hosts.") or last in _MAY_DIFFER:
            continue
        compared[name] = ("given" if value is not None else None) if last in _PLACES else value
    check_same(compared | facts)


def check_same(facts: Mapping[str, Any]) -> None:
    """Compares named facts, plain data, between all processes. Every process calls this.

    Raises:
      UserError: on all processes alike; it names those that differ.
    """
    if jax.process_count() == 1:
        return
    said = _exchange({name: json.dumps(value, sort_keys=True) for name, value in facts.items()})
    for number, theirs in enumerate(said):
        differing = sorted(
            name for name in said[0].keys() | theirs.keys() if said[0].get(name) != theirs.get(name)
        )
        if differing:
            details = "; ".join(
                f"{name} is {said[0].get(name)} and {theirs.get(name)}" for name in differing
            )
            raise UserError(
                f"processes 0 and {number} were told different things ({details}); start all with the same command"
            )


def fingerprint(arrays: Any) -> int:
    """A checksum of all arrays of a tree; 0 where there is nobody to compare it with."""
    checksum = 0
    for array in jax.tree.leaves(arrays) if jax.process_count() > 1 else []:
        checksum = zlib.crc32(np.asarray(array).tobytes(), checksum)
    return checksum


def _exchange(facts: dict[str, str]) -> list[dict[str, str]]:
    """Those of every process, by number."""
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
