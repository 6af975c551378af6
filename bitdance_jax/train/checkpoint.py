"""Checkpoints of a training run: state and place in the data, written by Orbax while training goes on."""

import errno
import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization, traverse_util
from tqdm import tqdm

from bitdance_jax.errors import UserError
from bitdance_jax.train.state import TrainState


class Checkpoints:
    """The checkpoints in one folder, newest last; a context manager, which waits for the last save on leaving.

    A checkpoint counts once Orbax has committed it: a kill at any moment leaves the ones before it as they were.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder.absolute()
        # Folders made in the foreground: where a full disk refuses one, threads that wait for it would hold up the exit for minutes.
        asynchronous = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, async_options=asynchronous)
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Copies the state off the device and writes it in the background; an error of the write is raised by the next call."""
        items = {
            "state": ocp.args.StandardSave(serialization.to_state_dict(state)),
            "data": ocp.args.JsonSave(data_state),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, as (state, data state); None where there is none.

        `abstract` is the state that this run's code makes, as jax.ShapeDtypeStructs. Damaged checkpoints are reported, and once an older
        one has been read, renamed to `STEP.damaged`.

        Raises:
          UserError: the checkpoint is of another model, or all of them are damaged.
        """
        damaged: list[int] = []
        for step in reversed(self.steps):
            try:
                state, data_state = self._read(step, abstract)
            except UserError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many types for a file that is missing, cut or garbled.
                message = f"checkpoint {self._folder / str(step)} is damaged and left out ({_first_line(error)})"
                tqdm.write(message, file=sys.stderr)
                damaged.append(step)
                continue
            self._put_aside(damaged)
            return state, data_state
        if damaged:
            raise UserError(f"no checkpoint in {self._folder} can be read; remove that folder to train from the start")
        return None

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), serialization.to_state_dict(abstract))
        self._check_same_model(step, target)
        items = {"state": ocp.args.StandardRestore(target), "data": ocp.args.JsonRestore()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return serialization.from_state_dict(abstract, restored["state"]), restored["data"]

    def _check_same_model(self, step: int, target: dict[str, Any]) -> None:
        saved = _shapes(self._manager.item_metadata(step)["state"].tree)
        wanted = _shapes(target)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {self._folder / str(step)} is of another model: {name} is {saved.get(name, 'missing')} there and "
                    f"{wanted.get(name, 'missing')} in this run; give the run another workdir"
                )

    def _put_aside(self, steps: list[int]) -> None:
        for step in steps:
            os.rename(self._folder / str(step), self._folder / f"{step}.damaged")
        if steps:
            self._manager.reload()


def quiet_orbax() -> None:
    """Keeps a command-line tool's output to its own lines: Orbax logs, with tracebacks, the errors that it also raises.

    After a failed read or write, TensorStore's other ones find the event loop closed, each with a traceback of its own.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that the disk (or the quota) is full, as Python or as TensorStore says it."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


def _shapes(tree: dict[str, Any]) -> dict[str, str]:
    """name -> "float32[3, 4]" for every array of a nested dict."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in traverse_util.flatten_dict(tree, sep="/").items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
