"""Checkpoints of a training run: state and place in the data, written by Orbax while training goes on."""

import errno
import os
import secrets
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
from bitdance_jax.errors import UserError
from bitdance_jax.io import paths
from bitdance_jax.train.state import TrainState


class Checkpoints:
    """The checkpoints in one folder, newest last; a context manager, which waits for the last save on leaving.

    All processes of a job call every method alike; each writes and reads what lies on its devices, so the folder must be one that all see.
    A checkpoint counts once Orbax has committed it: a kill at any moment leaves the ones before it as they were. It may be restored on
    another mesh and by another number of processes.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int) -> None:
        """Opens or makes the folder, local or gs://, of which the newest `keep` checkpoints are kept.

        Raises:
          UserError: the folder cannot be reached or holds something else, or not all processes see the
            same one.
        """
        paths.check_checkpoint_path(folder)
        self._folder = paths.make_folder(folder)
        _check_own(self._folder)
        # Folders made in the foreground: where a full disk refuses one, threads that wait for it would hold up the exit for minutes.
        asynchronous = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, async_options=asynchronous
        )
        self._state_handler, self._json_handler = (
            ocp.StandardCheckpointHandler(),
            ocp.JsonCheckpointHandler(),
        )
        handlers = {
            "state": self._state_handler,
            "place": self._json_handler,
            "checksums": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        if jax.process_count() > 1:
            _check_shared(self._folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A failure may be this process's alone: then the others do not come to the end of a save.
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

    def save(self, step: int, state: TrainState, place: dict[str, Any]) -> None:
        """Copies the state off the devices and writes it in the background; an error of the write is raised by a later call.

        Args:
          step: of the state.
          state: arrays, on any mesh.
          place: in the data, JSON-ready, the same on all processes.
        """
        arrays = serialization.to_state_dict(state)
        items = {
            "state": ocp.args.StandardSave(arrays),
            "place": ocp.args.JsonSave(place),
            "checksums": ocp.args.JsonSave(_checksums(arrays)),
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
        """The newest checkpoint that can be read, as (state, place in the data); None where there is none.

        Damaged checkpoints are reported, and once an older one has been read, renamed to `STEP.damaged`. What one process cannot read, all
        of them leave out.

        Args:
          abstract: the state that this run's code makes, as jax.ShapeDtypeStructs with the shardings that it shall have.

        Raises:
          UserError: the checkpoint is of another model, or all of them are damaged.
        """
        damaged: list[int] = []
        while (step := self._newest_but(damaged)) >= 0:
            found = self._read(step, abstract)
            if found is not None:
                self._put_aside(damaged)
                return found
            damaged.append(step)
        if damaged:
            raise UserError(
                f"no checkpoint in {self._folder} can be read; remove that folder to train from the start"
            )
        return None

    def _newest_but(self, damaged: list[int]) -> int:
        """The newest step but these, as process 0 sees them; -1: there is none."""
        return multihost.on_process_0(lambda: max(set(self.steps) - set(damaged), default=-1))

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """What is in a checkpoint; None on all processes, and reported, if one of them cannot read it or it is not what was saved."""
        folder, found, problem = (
            self._folder / str(step),
            None,
            "another process cannot read its part",
        )
        try:
            found = self._read_own_part(folder, serialization.to_state_dict(abstract))
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for a file that is missing, cut or garbled.
            problem = _first_line(error)
        if multihost.all_true(found is not None) and found is not None:
            arrays, place, checksums = found
            wrong = sorted(
                name for name, value in _checksums(arrays).items() if checksums.get(name) != value
            )
            if not wrong:
                return serialization.from_state_dict(abstract, arrays), place
            problem = f"{wrong[0]} is not what was saved"
        if found is None or jax.process_index() == 0:
            tqdm.write(f"checkpoint {folder} is damaged and left out ({problem})", file=sys.stderr)
        return None

    def _read_own_part(
        self, folder: epath.Path, target: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
        """State, place in the data and checksums. Not by the manager, which ends with a collective: others would wait for a failure."""
        self._check_same_model(folder, target)
        arrays = self._state_handler.restore(
            folder / "state", args=ocp.args.StandardRestore(target)
        )
        place, checksums = (
            self._json_handler.restore(folder / name) for name in ("place", "checksums")
        )
        return (
            arrays,
            msgspec.convert(place, dict[str, Any]),
            msgspec.convert(checksums, dict[str, int]),
        )

    def _check_same_model(self, folder: epath.Path, target: dict[str, Any]) -> None:
        saved, wanted = (
            _shapes(self._state_handler.metadata(folder / "state").tree),
            _shapes(target),
        )
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {folder} is of another model: {name} is {saved.get(name, 'missing')} there and "
                    f"{wanted.get(name, 'missing')} in this run; give the run another workdir"
                )

    def _put_aside(self, steps: list[int]) -> None:
        def rename() -> int:
            for step in steps:
                (self._folder / str(step)).rename(self._folder / f"{step}.damaged")
            return len(steps)

        if steps:
            multihost.on_process_0(rename)
            self._manager.reload()


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that the disk (or the quota) is full, as Python or as TensorStore says it."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(
        text in str(error) for text in ("No space left on device", "Disk quota exceeded")
    )


def _check_own(folder: epath.Path) -> None:
    """Raises a UserError where Orbax would take other folders, such as "2019", for checkpoints."""
    for step in folder.iterdir():
        if step.name.isdecimal() and step.is_dir():
            names = {path.name for path in step.iterdir()}
            if names and not names & {"_CHECKPOINT_METADATA", "state", "place", "checksums"}:
                raise UserError(
                    f"{step} is not a checkpoint; choose another folder for run.checkpoints"
                )


def _remove_unfinished(folder: epath.Path) -> None:
    """Removes what a failed save has left on a local disk, which may be full of it."""
    if "://" in str(folder):
        return  # The next start removes it.
    for _ in range(5):  # TensorStore's other writes still run, and may make their folders anew
        for path in (path for path in folder.iterdir() if ".orbax-checkpoint-tmp" in path.name):
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


def _check_shared(folder: epath.Path) -> None:
    def mark(number: int) -> epath.Path:
        return folder / f".shared_{number}"

    def leave_mark() -> int:
        number = secrets.randbelow(2**31)
        mark(number).write_text("")
        return number

    left = mark(multihost.on_process_0(leave_mark))
    shared = multihost.all_true(left.exists())
    if jax.process_index() == 0:
        left.unlink()
    if not shared:
        raise UserError(
            f"not all processes see the same {folder}; "
            "set run.checkpoints to a folder that all hosts share, or to gs://BUCKET/FOLDER"
        )


def _checksums(arrays: dict[str, Any]) -> dict[str, int]:
    """Of every array, computed where it lies: the same on any mesh. TensorStore reads back what has changed on the disk without a word."""
    return {
        name: int(value)
        for name, value in jax.device_get(
            _sums(traverse_util.flatten_dict(arrays, sep="/"))
        ).items()
    }


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Each array's bits as unsigned integers, summed modulo 2^32: in any order the same."""

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
