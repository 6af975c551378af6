"""The folder of a run: only one run writes to it, and a resumed run has the same config."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax import traverse_util

from bitdance_jax.config import to_dict
from bitdance_jax.convert import peft
from bitdance_jax.distributed import multihost
from bitdance_jax.errors import ConfigError, UserError, short
from bitdance_jax.io import model_folder, readers
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.locks import LOCK, writer_lock
from bitdance_jax.io.paths import make_folder
from bitdance_jax.train.task import TrainingConfig


_RUN_MAY_CHANGE = (
    "workdir",
    "steps",
    "spike",
    "stall_minutes",
    "log_every",
    "save_every",
    "preview_every",
    "keep",
    "checkpoints",
    "export_dtype",
)
"""Fields of `run` that a resumed run may change: they do not affect the result, except that `steps`
moves the end of a cosine schedule, as is expected of more steps."""
_MAY_CHANGE = re.compile(
    rf"run\.({'|'.join(_RUN_MAY_CHANGE)})|data\.workers|inception|compilation_cache|"
    r"(preview|mesh|hosts|profile)(\..*)?"
)

_FORMER_DEFAULTS = {"model.transformer.residual_dtype": "compute", "run.gradient_dtype": "compute"}
"""What bfloat16 runs did whose config.json does not have these fields yet."""

_SHOWN = 8
"""Differences of two configs that a message names."""

_NAMES = ["config.json", "model.json", "checkpoints", "metrics.csv", "curves.png", "images"]
_NAMES += ["tensorboard", "profile", "model", "text_tokenizer"]
"""The files and folders that a run writes."""


@contextlib.contextmanager
def only_run(config: TrainingConfig) -> Iterator[None]:
    """Locks the workdir and a local folder of checkpoints against other runs.

    Process 0 does so for all; every process calls this alike.

    Raises:
      UserError: another run has the lock.
    """
    with multihost.entered_on_process_0(_locks(config)):
        yield


@contextlib.contextmanager
def _locks(config: TrainingConfig) -> Iterator[None]:
    folders = (config.run.workdir, config.run.checkpoint_folder)
    local = {os.path.realpath(folder) for folder in folders if "://" not in folder}
    with contextlib.ExitStack() as stack:
        for folder in sorted(local):
            stack.enter_context(writer_lock(folder, is_folder=True))
        yield


def check_config(config: TrainingConfig) -> None:
    """Checks that `run.workdir` is new, or of a run with this config.

    Raises:
      ConfigError: it is of a run with another config and has checkpoints; the message names the
        fields. Or it has files that no run wrote.
    """
    workdir = Path(config.run.workdir)
    path = workdir / "config.json"
    existing = [name for name in _NAMES if _has_content(workdir / name)]
    if existing and not _is_config(path):
        raise ConfigError(
            f"{workdir} has no config.json of a run, which would overwrite its "
            f"{', '.join(existing)}; restore config.json, or set another run.workdir",
            "run.workdir",
        )
    if not (workdir / "model" / peft.CONFIG).is_file():
        model_folder.check_writable(workdir / "model", force=True)
    if not (path.exists() and has_checkpoints(config)):
        return
    recorded = _flat(readers.read_json(path, fix="restore it, or give the run another workdir"))
    current = _flat(json.loads(_text(config)))
    if recorded.get("run.compute_dtype") == "bfloat16":
        former = {name: value for name, value in _FORMER_DEFAULTS.items() if name in current}
        recorded = former | recorded
    # Any other field that the recorded config lacks is newer; its default is the former behaviour.
    names = sorted(
        n for n in recorded if not _MAY_CHANGE.fullmatch(n) and recorded[n] != current.get(n)
    )
    if names:
        changes = ", ".join(
            f"{name} was {short(recorded[name])}, now {short(current.get(name))}"
            for name in names[:_SHOWN]
        )
        if len(names) > _SHOWN:
            changes += f", and {len(names) - _SHOWN} more"
        raise ConfigError(
            f"{workdir} has a run with another config ({changes}); set another run.workdir",
            "run.workdir",
        )


def has_checkpoints(config: TrainingConfig) -> bool:
    """Whether there are checkpoints that the run resumes from."""
    checkpoints = config.run.checkpoint_folder
    exists = "://" in checkpoints or Path(checkpoints).exists()
    return exists and any(step.name.isdecimal() for step in make_folder(checkpoints).iterdir())


def _is_config(path: Path) -> bool:
    """Whether it is a run's config.json."""
    try:
        recorded = readers.read_json(path)
    except UserError:
        return False
    return {"run", "data", "optimizer"} <= recorded.keys()


def _has_content(path: Path) -> bool:
    """Whether the path exists and is not a folder that is empty except for a lock."""
    return os.path.lexists(path) and not (
        path.is_dir() and {child.name for child in path.iterdir()} <= {LOCK}
    )


def record_config(config: TrainingConfig) -> None:
    """Writes config.json."""
    with replace_file(Path(config.run.workdir) / "config.json") as path:
        path.write_text(_text(config))


def _text(config: TrainingConfig) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(config, sep=".")
