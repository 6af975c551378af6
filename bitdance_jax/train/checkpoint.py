"""Checkpoints of a training run: training state and iterator state, written by Orbax in the
background."""

import errno
import os
import shutil
import sys
import time
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization, traverse_util
from tqdm import tqdm

from bitdance_jax.distributed import multihost
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.io import paths
from bitdance_jax.io.shared_folder import check_shared
from bitdance_jax.train.state import TrainState


STATE = "state"
ITERATOR = "iterator"
CHECKSUMS = "checksums"
"""The items of a checkpoint."""


class Checkpoints:
    """The checkpoints in one folder; a context manager, which waits for the last save on leaving.

    All processes of a job call every method alike. Each writes and reads the arrays on its own
    devices, so all of them must have access to the folder. A checkpoint exists once Orbax has
    committed it: a kill at any moment leaves the earlier ones intact. It may be restored on another
    mesh and by another number of processes.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int) -> None:
        """Opens or makes the folder, local or gs://, in which the newest `keep` checkpoints remain.

        Raises:
          UserError: the folder cannot be accessed, contains something else, or is not shared by all
            processes.
        """
        paths.check_checkpoint_path(folder)
        self._folder = paths.make_folder(folder)
        _check_only_checkpoints(self._folder)
        # Folders are made in the foreground: if the disk is full, threads that wait for one would
        # delay the exit by minutes.
        asynchronous = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, async_options=asynchronous
        )
        self._state_handler = ocp.StandardCheckpointHandler()
        self._json_handler = ocp.JsonCheckpointHandler()
        handlers = {
            STATE: self._state_handler,
            ITERATOR: self._json_handler,
            CHECKSUMS: ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        check_shared(self._folder, "run.checkpoints")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # If only this process failed, the others do not finish a save, and waiting would hang.
        if error is None or jax.process_count() == 1:
            try:
                self._manager.close()
            except Exception as failed:
                error = failed
                raise
            finally:
                if error is not None and jax.process_count() == 1:
                    _remove_unfinished(self._folder)

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, iterator_state: dict[str, Any]) -> None:
        """Copies the state off the devices and writes it in the background.

        An error of the write is raised by a later call.

        Args:
          step: number of the step.
          state: arrays, on any mesh.
          iterator_state: of the data, JSON-ready, equal on all processes.
        """
        arrays = serialization.to_state_dict(state)
        items = {
            STATE: ocp.args.StandardSave(arrays),
            ITERATOR: ocp.args.JsonSave(iterator_state),
            CHECKSUMS: ocp.args.JsonSave(_checksums(arrays)),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Returns once the last save is complete."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def check(self) -> None:
        """Raises the error of a save in the background, if one has failed."""
        self._manager.check_for_errors()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest readable checkpoint, as (state, iterator state); None if there is no
        checkpoint.

        Damaged checkpoints are reported, and renamed to `STEP.damaged` once an older one has been
        read. A checkpoint that one process cannot read is skipped by all.

        Args:
          abstract: the state of this run as jax.ShapeDtypeStructs with their shardings.

        Raises:
          FileError: the checkpoint is of another model, or all checkpoints are damaged.
        """
        damaged: list[int] = []
        while (step := self._newest_except(damaged)) >= 0:
            found = self._read(step, abstract)
            if found is not None:
                self._rename_damaged(damaged)
                return found
            damaged.append(step)
        if damaged:
            raise FileError(
                f"no checkpoint in {self._folder} can be read; "
                "remove that folder to train from the start",
                self._folder,
            )
        return None

    def _newest_except(self, damaged: list[int]) -> int:
        """The newest step except these, as process 0 lists them; -1: there is none."""
        return multihost.on_process_0(lambda: max(set(self.steps) - set(damaged), default=-1))

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """A checkpoint; None on all processes if one of them cannot read it, or a checksum differs.

        That is reported.
        """
        folder = self._folder / str(step)
        found = None
        problem = "another process cannot read its part"
        try:
            found = self._read_local(folder, serialization.to_state_dict(abstract))
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files.
            problem = _first_line(error)
        if multihost.all_true(found is not None) and found is not None:
            arrays, iterator_state, checksums = found
            wrong = sorted(
                name for name, value in _checksums(arrays).items() if checksums.get(name) != value
            )
            if not wrong:
                return serialization.from_state_dict(abstract, arrays), iterator_state
            problem = f"{wrong[0]} is not what was saved"
        if found is None or jax.process_index() == 0:
            tqdm.write(f"checkpoint {folder} is damaged and skipped ({problem})", file=sys.stderr)
        return None

    def _read_local(
        self, folder: epath.Path, target: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
        """State, iterator state and checksums.

        Not read by Orbax's manager, whose restore ends with a collective: if one process failed,
        the others would hang.
        """
        self._check_same_model(folder, target)
        arrays = self._state_handler.restore(folder / STATE, args=ocp.args.StandardRestore(target))
        iterator_state = self._json_handler.restore(folder / ITERATOR)
        checksums = self._json_handler.restore(folder / CHECKSUMS)
        return (
            arrays,
            msgspec.convert(iterator_state, dict[str, Any]),
            msgspec.convert(checksums, dict[str, int]),
        )

    def _check_same_model(self, folder: epath.Path, target: dict[str, Any]) -> None:
        saved = _shapes(self._state_handler.metadata(folder / STATE).tree)
        expected = _shapes(target)
        for name in sorted(saved.keys() | expected.keys()):
            if saved.get(name) != expected.get(name):
                raise FileError(
                    f"checkpoint {folder} is of another model: {name} is "
                    f"{saved.get(name, 'missing')} there and {expected.get(name, 'missing')} in "
                    "this run; set another run.workdir",
                    folder,
                )

    def _rename_damaged(self, steps: list[int]) -> None:
        def rename() -> int:
            for step in steps:
                (self._folder / str(step)).rename(self._folder / f"{step}.damaged")
            return len(steps)

        if steps:
            multihost.on_process_0(rename)
            self._manager.reload()


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of Python or TensorStore means that the disk or the quota is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(
        text in str(error) for text in ("No space left on device", "Disk quota exceeded")
    )


def _check_only_checkpoints(folder: epath.Path) -> None:
    """Raises a FileError if Orbax would mistake other folders, such as "2019", for checkpoints."""
    for step in folder.iterdir():
        if step.name.isdecimal() and step.is_dir():
            names = {path.name for path in step.iterdir()}
            if names and not names & {"_CHECKPOINT_METADATA", STATE, ITERATOR, CHECKSUMS}:
                raise FileError(
                    f"{step} is not a checkpoint; set run.checkpoints to another folder", step
                )


def _remove_unfinished(folder: epath.Path) -> None:
    """Removes the files of a failed save from a local disk, which they may fill."""
    if "://" in str(folder):
        return  # The next start removes them.
    for _ in range(5):  # Other writes of TensorStore still run, and may make their folders again.
        for path in (path for path in folder.iterdir() if ".orbax-checkpoint-tmp" in path.name):
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


def _checksums(arrays: dict[str, Any]) -> dict[str, int]:
    """Of every array, computed on its devices: the same on any mesh.

    TensorStore does not notice if a file has changed on the disk.
    """
    sums = jax.device_get(_sums(traverse_util.flatten_dict(arrays, sep="/")))
    return {name: int(value) for name, value in sums.items()}


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The sum of each array's bits as unsigned integers modulo 2^32, which has no order."""

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))

    return {
        name: jnp.sum(bits(x).astype(jnp.uint32), dtype=jnp.uint32) for name, x in arrays.items()
    }


def _shapes(tree: dict[str, Any]) -> dict[str, str]:
    """name -> "float32[3, 4]" for every array of a nested dict."""
    return {
        name: f"{x.dtype}{list(x.shape)}"
        for name, x in traverse_util.flatten_dict(tree, sep="/").items()
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
