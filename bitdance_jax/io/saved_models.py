"""What a user names as a model: a model folder, the embedded model, or the folder of a training run.

Of a run it is the finished model, or the newest EMA weights where it goes on. At its start a run notes in `model.json`
what its model folder will hold but for weights and figures, so that its checkpoints can be used without its data. Here a
run is only read: it may be training meanwhile.
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

from bitdance_jax.errors import UserError
from bitdance_jax.io import files, inputs, model_folder
from bitdance_jax.io.model_folder import ModelFolder, Params


EMBEDDED = "emoji"
"""Name of the small model that comes with the package."""

RECORD = "model.json"


@dataclass(frozen=True)
class Record:
    """What `model.json` holds.

    Attributes:
      kind, config, metadata: as the model folder will have them.
      checkpoints: their folder; None: the run's own `checkpoints`.
      tokenizer: model folder of the frozen tokenizer, and its fingerprint; None for a run that has none.
    """

    kind: model_folder.Kind
    config: dict[str, Any]
    metadata: dict[str, Any]
    checkpoints: str | None = None
    tokenizer: tuple[str, str] | None = None

    def write(self, run: str | os.PathLike[str]) -> None:
        """Notes it in a run's folder, with places that hold from any current folder."""
        places: dict[str, Any] = {}
        if self.checkpoints is not None:
            places["checkpoints"] = _absolute(self.checkpoints)
        if self.tokenizer is not None:
            places["tokenizer"] = (_absolute(self.tokenizer[0]), self.tokenizer[1])
        with files.replacing(Path(run) / RECORD) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self) | places, indent=2) + "\n")


@dataclass(frozen=True)
class UnfinishedRun:
    """A run whose newest checkpoint is of a later step than its model folder, if it has that already.

    Attributes:
      folder: of the run.
      record: see Record.
      steps: of its checkpoints, newest first.
    """

    folder: Path
    record: Record
    steps: tuple[int, ...]

    @property
    def described(self) -> ModelFolder:
        """What its model folder will hold, without the weights."""
        return ModelFolder(self.record.kind, self.record.config, self.record.metadata, {})

    def load(self) -> ModelFolder:
        """What its model folder would hold if it ended now: the EMA weights of the newest checkpoint that can be read.

        Raises:
          UserError: none can be read, or the tokenizer is not there any more.
        """
        for step in self.steps:
            weights = _ema(self._checkpoints / str(step))
            if weights is None:
                tqdm.write(
                    f"the checkpoint of step {step} of {self.folder} cannot be read and is left out",
                    file=sys.stderr,
                )
                continue
            tqdm.write(
                f"{self.folder} is not finished; these are its averaged weights after step {step}",
                file=sys.stderr,
            )
            params = (
                weights
                if self.record.tokenizer is None
                else {"model": weights, "tokenizer": self._tokenizer()}
            )
            metadata = self.record.metadata | {"steps": step}
            return dataclasses.replace(self.described, metadata=metadata, params=params)
        raise UserError(
            f"no checkpoint of {self.folder} can be read; start the run again, or give another model"
        )

    @property
    def _checkpoints(self) -> epath.Path:
        return checkpoint_folder(self.folder, self.record)

    def _tokenizer(self) -> Params:
        assert self.record.tokenizer is not None
        folder, expected = self.record.tokenizer
        saved = load(folder)
        if fingerprint(folder) != expected:
            raise UserError(
                f"the tokenizer in {folder} is not the one that {self.folder} trains on; bring that one back"
            )
        return saved.params["tokenizer"] if saved.kind == "class_conditional" else saved.params


def locate(folder: str | os.PathLike[str]) -> str | os.PathLike[str] | UnfinishedRun:
    """Of a training run its model folder, or the run if it is not finished; of "emoji" the embedded one; any other folder itself.

    Raises:
      UserError: the run has saved nothing yet.
    """
    if str(folder) == EMBEDDED:
        return Path(__file__).parents[1] / "assets" / "emoji" / "model"
    run = Path(folder)
    if "://" in str(folder) or not (run / RECORD).is_file():
        return folder
    record = inputs.read_json(
        run / RECORD, Record, mend="start the run again, which writes it anew"
    )
    steps = sorted(_steps(checkpoint_folder(run, record)), reverse=True)
    finished = run / "model"
    done = (
        model_folder.read_config(finished).metadata.get("steps", 0)
        if (finished / "config.json").is_file()
        else None
    )
    if not steps and done is None:
        raise UserError(
            f"the run {run} has saved nothing yet; wait for its first checkpoint, or lower --run.save-every"
        )
    return (
        UnfinishedRun(run, record, tuple(steps))
        if steps and (done is None or steps[0] > done)
        else finished
    )


def read_config(folder: str | os.PathLike[str]) -> ModelFolder:
    """`model_folder.read_config` of what `locate` finds."""
    found = locate(folder)
    return found.described if isinstance(found, UnfinishedRun) else model_folder.read_config(found)


def load(folder: str | os.PathLike[str]) -> ModelFolder:
    """`model_folder.load` of what `locate` finds."""
    found = locate(folder)
    return found.load() if isinstance(found, UnfinishedRun) else model_folder.load(found)


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """12 hex digits that tell one model from another: of a model folder's config.json, which holds the checksums of the weights.

    Of a run that is not finished each checkpoint is another model.

    Raises:
      UserError: no such model.
    """
    found = locate(folder)
    if isinstance(found, UnfinishedRun):
        content = (found.folder / RECORD).read_bytes() + str(found.steps[0]).encode()
    else:
        model_folder.read_config(found)  # says what is wrong with it
        content = (epath.Path(found) / "config.json").read_bytes()
    return hashlib.sha256(content).hexdigest()[:12]


def check_unchanged(folder: str | os.PathLike[str], before: str) -> None:
    """Raises a UserError if `fingerprint` is not what it was before the weights were read, which then may be older."""
    if fingerprint(folder) != before:
        raise UserError(
            f"{os.fspath(folder)} has changed while its weights were read; run the same command again"
        )


def checkpoint_folder(run: Path, record: Record) -> epath.Path:
    """Where a run's checkpoints are."""
    return epath.Path(record.checkpoints or os.path.abspath(run / "checkpoints"))


def _absolute(folder: str) -> str:
    return folder if folder == EMBEDDED or "://" in folder else os.path.abspath(folder)


def _steps(checkpoints: epath.Path) -> list[int]:
    """Of the complete ones: Orbax writes under other names."""
    there = "://" in str(checkpoints) or checkpoints.exists()
    return (
        [int(path.name) for path in files.folder(checkpoints).iterdir() if path.name.isdecimal()]
        if there
        else []
    )


def _ema(checkpoint: epath.Path) -> Params | None:
    """A checkpoint's EMA weights as numpy arrays; None if they cannot be read or are not what was saved."""
    state, handler = checkpoint / "state", ocp.PyTreeCheckpointHandler()
    try:
        names = {"ema": handler.metadata(state).tree["ema"]}
        item = jax.tree.map(lambda _: np.zeros(()), names)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        restored = handler.restore(
            state,
            args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True),
        )
        checksums = ocp.JsonCheckpointHandler().restore(checkpoint / "checksums")
    except (
        Exception
    ):  # Orbax and TensorStore raise many types for a checkpoint that they cannot read.
        return None
    arrays = traverse_util.flatten_dict(restored, sep="/")
    sound = all(checksums.get(name) == checksum(array) for name, array in arrays.items())
    return restored["ema"] if sound else None


def checksum(array: np.ndarray) -> int:
    """An array's bits as unsigned integers, summed modulo 2^32, as `train.checkpoint` computes it where the array lies."""
    return int(np.sum(array.view(f"uint{8 * array.dtype.itemsize}"), dtype=np.uint32))
