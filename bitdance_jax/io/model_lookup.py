"""Finds the model that a user names: a model folder, an embedded model, or a training run.

The model of a training run is the finished one, or while it is unfinished the newest EMA weights
(those of the parameters, for a run without EMA).
At its start a run writes `model.json`, which describes its future model folder, so that its
checkpoints can be used without its data. This module only reads a run: it may be training.
"""

import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from tqdm import tqdm

from bitdance_jax.errors import FileError
from bitdance_jax.io import atomic, model_folder, paths, readers
from bitdance_jax.io.model_folder import ModelFolder, Params


EMBEDDED = "emoji"
"""Name of the small text-to-image model that comes with the package."""

EMBEDDED_CLASSES = "emoji_classes"
"""Name of the small class-conditional model that comes with the package."""

_ASSETS = Path(__file__).parents[1] / "assets" / "emoji"
_EMBEDDED_FOLDERS = {
    EMBEDDED: _ASSETS / "text_to_image",
    EMBEDDED_CLASSES: _ASSETS / "class_conditional",
}

RECORD = "model.json"


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's `model.json`.

    Attributes:
      kind: of the future model folder.
      config: of the future model folder.
      metadata: of the future model folder.
      checkpoints: the folder of the checkpoints; None: the run's own `checkpoints`.
      tokenizer: model folder of the frozen tokenizer and its fingerprint; None if the run has none.
        For a tokenizer's run: of the one whose encoder is frozen.
      base: model folder of the weights that the run does not train, and its fingerprint; None if it
        trains all.
      files: further ones of the future model folder, by their path in it; they are written beside
        `model.json`, not into it.
      is_adapter: the run trains an adapter of `base`, which is no model folder.
    """

    kind: model_folder.Kind
    config: dict[str, Any]
    metadata: dict[str, Any]
    checkpoints: str | None = None
    tokenizer: tuple[str, str] | None = None
    base: tuple[str, str] | None = None
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    is_adapter: bool = False

    def write(self, run: str | os.PathLike[str]) -> None:
        """Writes it to a run's folder, with absolute paths."""
        record = dataclasses.asdict(self)
        for name, content in record.pop("files").items():
            path = Path(run) / name
            path.parent.mkdir(exist_ok=True)
            with atomic.replace_file(path) as temporary:
                temporary.write_bytes(content)
        if self.checkpoints is not None:
            record["checkpoints"] = _absolute(self.checkpoints)
        for name in ("tokenizer", "base"):
            if record[name] is not None:
                folder, expected = record[name]
                record[name] = (_absolute(folder), expected)
        with atomic.replace_file(Path(run) / RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")


@dataclass(frozen=True)
class UnfinishedRun:
    """A run without a model folder, or with a checkpoint of a later step than its model folder.

    Attributes:
      folder: of the run.
      record: see RunRecord.
      steps: of its checkpoints, newest first.
    """

    folder: Path
    record: RunRecord
    steps: tuple[int, ...]

    @property
    def described(self) -> ModelFolder:
        """Its future model folder without the weights."""
        return ModelFolder(self.record.kind, self.record.config, self.record.metadata, {})

    def load(self) -> ModelFolder:
        """A model folder of the weights in the newest checkpoint that can be read.

        Raises:
          FileError: no checkpoint can be read, or the tokenizer is missing.
        """
        for step in self.steps:
            weights = _read_weights(checkpoint_folder(self.folder, self.record) / str(step))
            if weights is None:
                tqdm.write(
                    f"the checkpoint of step {step} of {self.folder} cannot be read; skipping it",
                    file=sys.stderr,
                )
                continue
            tqdm.write(
                f"{self.folder} is not finished; these are its weights after step {step}",
                file=sys.stderr,
            )
            if self.record.base is not None:
                weights = self._with_base(weights, *self.record.base)
            params = weights
            if self.record.tokenizer is not None:
                frozen = self._tokenizer(*self.record.tokenizer)
                if self.record.kind == "tokenizer":
                    params = {**weights, "encoder": frozen["encoder"]}
                else:
                    params = {"model": weights, "tokenizer": frozen}
            metadata = self.record.metadata | {"steps": step}
            return dataclasses.replace(self.described, metadata=metadata, params=params)
        raise FileError(
            f"no checkpoint of {self.folder} can be read; restart the run, or give another model",
            self.folder,
        )

    def _tokenizer(self, folder: str, expected: str) -> Params:
        saved = load(folder)
        if fingerprint(folder) != expected:
            raise FileError(
                f"the tokenizer in {folder} is not the one that {self.folder} trains on; restore it"
            )
        return saved.params if saved.kind == "tokenizer" else saved.params["tokenizer"]

    def _with_base(self, weights: Params, folder: str, expected: str) -> Params:
        """The trained weights among those that are not trained."""
        saved = load(folder)
        if fingerprint(folder) != expected:
            raise FileError(
                f"the model in {folder} is not the one that {self.folder} trains a part of; restore"
                " it"
            )
        both = [traverse_util.flatten_dict(tree) for tree in (saved.params["model"], weights)]
        return traverse_util.unflatten_dict(both[0] | both[1])


def is_embedded(folder: str | os.PathLike[str]) -> bool:
    """Whether this names a model of the package."""
    return str(folder) in _EMBEDDED_FOLDERS


def locate(folder: str | os.PathLike[str]) -> str | os.PathLike[str] | UnfinishedRun:
    """Resolves what a user names as a model.

    Returns:
      for "emoji" and "emoji_classes", the embedded model folders; for a finished run, its model
      folder; for another run, the UnfinishedRun; any other folder unchanged.

    Raises:
      FileError: the run has not saved anything yet, or trains an adapter.
    """
    if (embedded := _EMBEDDED_FOLDERS.get(str(folder))) is not None:
        return embedded
    run = Path(folder)
    if paths.is_remote(folder) or not (run / RECORD).is_file():
        return folder
    record = readers.read_json(
        run / RECORD, RunRecord, fix="start the run again, which rewrites it"
    )
    if record.is_adapter:
        base = record.base[0] if record.base else "its base"
        raise FileError(
            f"{run} trains an adapter and no model; give {base} as the model, and {run} as lora",
            run,
        )
    steps = sorted(_steps(checkpoint_folder(run, record)), reverse=True)
    finished = run / "model"
    if (finished / "config.json").is_file():
        finished_steps = model_folder.read_config(finished).metadata.get("steps", 0)
        if not steps or steps[0] <= finished_steps:
            return finished
    elif not steps:
        raise FileError(
            f"the run {run} has saved nothing yet; wait for its first checkpoint,"
            " or lower run.save_every"
        )
    return UnfinishedRun(run, record, tuple(steps))


def read_config(folder: str | os.PathLike[str]) -> ModelFolder:
    """`model_folder.read_config` of what `locate` finds."""
    found = locate(folder)
    return found.described if isinstance(found, UnfinishedRun) else model_folder.read_config(found)


def load(folder: str | os.PathLike[str]) -> ModelFolder:
    """`model_folder.load` of what `locate` finds."""
    found = locate(folder)
    return found.load() if isinstance(found, UnfinishedRun) else model_folder.load(found)


def open_weights(folder: str | os.PathLike[str]) -> ModelFolder:
    """As `load`, but the arrays of a model folder are StoredArrays: indexing one reads the indexed
    part alone."""
    found = locate(folder)
    if isinstance(found, UnfinishedRun):
        return found.load()
    return model_folder.load(found, read_array=lambda _, stored: stored)


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """12 hex digits that identify a model.

    They hash a model folder's config.json, which holds the checksums of the weights. An unfinished
    run has another fingerprint with each checkpoint.

    Raises:
      FileError: there is no such model.
    """
    found = locate(folder)
    if isinstance(found, UnfinishedRun):
        content = (found.folder / RECORD).read_bytes() + str(found.steps[0]).encode()
    else:
        model_folder.read_config(found)  # raises the error of a folder that is not a model
        content = (epath.Path(found) / "config.json").read_bytes()
    return hashlib.sha256(content).hexdigest()[:12]


def check_unchanged(folder: str | os.PathLike[str], before: str) -> None:
    """Raises a FileError if the `fingerprint` is not the one taken before the weights were read."""
    if fingerprint(folder) != before:
        raise FileError(
            f"{os.fspath(folder)} changed while its weights were read; run the same command again"
        )


def checkpoint_folder(run: Path, record: RunRecord) -> epath.Path:
    """The folder of a run's checkpoints."""
    return epath.Path(record.checkpoints or os.path.abspath(run / "checkpoints"))


def checksum(array: np.ndarray) -> int:
    """An array's bits as unsigned integers, summed modulo 2^32.

    `train.checkpoint` computes the same sum on the devices.
    """
    return int(np.sum(array.view(f"uint{8 * array.dtype.itemsize}"), dtype=np.uint32))


def _absolute(folder: str) -> str:
    return folder if is_embedded(folder) or paths.is_remote(folder) else os.path.abspath(folder)


def _steps(checkpoints: epath.Path) -> list[int]:
    """Steps of the complete checkpoints: Orbax writes the others under other names."""
    if not paths.is_remote(checkpoints) and not checkpoints.exists():
        return []
    folder = paths.make_folder(checkpoints)
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def _read_weights(checkpoint: epath.Path) -> Params | None:
    """A checkpoint's EMA weights, or without any its parameters, as numpy arrays; None if they
    cannot be read or are damaged."""
    state = checkpoint / "state"
    handler = ocp.PyTreeCheckpointHandler()
    try:
        tree = handler.metadata(state).tree
        part = "ema" if tree.get("ema") else "params"
        names = {part: tree[part]}
        item = jax.tree.map(lambda _: np.zeros(()), names)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        restored = handler.restore(
            state,
            args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True),
        )
        checksums = ocp.JsonCheckpointHandler().restore(checkpoint / "checksums")
    except Exception:  # Orbax and TensorStore raise many types for an unreadable checkpoint.
        return None
    arrays = traverse_util.flatten_dict(restored, sep="/")
    intact = all(checksums.get(name) == checksum(array) for name, array in arrays.items())
    return restored[part] if intact else None
