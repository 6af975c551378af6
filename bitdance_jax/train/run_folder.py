"""A run's folder: one process writes it, and `config.json` says what may differ when the run goes on."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax import traverse_util

from bitdance_jax.config import to_dict
from bitdance_jax.distributed import multihost
from bitdance_jax.errors import UserError, short
from bitdance_jax.io import model_folder, readers
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.locks import LOCK, writer_lock
from bitdance_jax.io.paths import make_folder
from bitdance_jax.train.task import TrainingConfig


# What a resumed run may change without another result (`steps` moves a cosine schedule's end, which is what asking for more steps means).
_RUN_MAY_CHANGE = (
    "workdir",
    "steps",
    "spike",
    "log_every",
    "save_every",
    "preview_every",
    "keep",
    "checkpoints",
    "export_dtype",
)
_MAY_CHANGE = re.compile(
    rf"run\.({'|'.join(_RUN_MAY_CHANGE)})|data\.workers|(preview|mesh|hosts|profile)(\..*)?"
)

# What a bfloat16 run did whose config.json does not yet have the field.
_BEFORE = {"model.transformer.residual_dtype": "compute", "run.gradient_dtype": "compute"}


_NAMES = ["config.json", "model.json", "checkpoints", "metrics.csv", "curves.png", "images"]
_NAMES += ["tensorboard", "profile", "model"]
"""What a run writes into its folder."""


@contextlib.contextmanager
def only_run(config: TrainingConfig) -> Iterator[None]:
    """Keeps other runs out of the workdir and out of a local folder of checkpoints until the block ends.

    Process 0 does so for all; every process calls this alike.

    Raises:
      UserError: another run is there.
    """
    with multihost.entered_on_process_0(_locks(config)):
        yield


@contextlib.contextmanager
def _locks(config: TrainingConfig) -> Iterator[None]:
    places = [
        place for place in (config.run.workdir, config.run.checkpoint_folder) if "://" not in place
    ]
    with contextlib.ExitStack() as stack:
        for place in sorted({os.path.realpath(place) for place in places}):
            stack.enter_context(writer_lock(place, is_folder=True))
        yield


def check_config(config: TrainingConfig) -> None:
    """Looks whether `run.workdir` is this run's to write to, or nobody's yet.

    Raises:
      UserError: it is that of a run with another config that has checkpoints (it names the fields), or
        has files that no run wrote.
    """
    workdir = Path(config.run.workdir)
    path = workdir / "config.json"
    there = [name for name in _NAMES if _is_something(workdir / name)]
    if there and not _is_config(path):
        what = (
            f"{workdir} has no config.json of a run, which would write over its {', '.join(there)}"
        )
        raise UserError(f"{what}; restore config.json, or choose another run.workdir")
    model_folder.check_writable(workdir / "model", force=True)
    if not (path.exists() and has_checkpoints(config)):
        return
    recorded = _flat(readers.read_json(path, fix="restore it, or give the run another workdir"))
    wanted = _flat(json.loads(_text(config)))
    if recorded.get("run.compute_dtype") == "bfloat16":
        recorded = {name: value for name, value in _BEFORE.items() if name in wanted} | recorded
    # Any other field that the recorded config lacks came with a newer version, and its default with the old behaviour.
    names = sorted(
        n for n in recorded if not _MAY_CHANGE.fullmatch(n) and recorded[n] != wanted.get(n)
    )
    if names:
        changes = ", ".join(
            f"{name} was {short(recorded[name])}, now {short(wanted.get(name))}" for name in names
        )
        raise UserError(
            f"{workdir} holds a run with another config ({changes}); give this one another workdir"
        )


def has_checkpoints(config: TrainingConfig) -> bool:
    """Whether the run has saved anything that it goes on from."""
    checkpoints = config.run.checkpoint_folder
    there = "://" in checkpoints or Path(checkpoints).exists()
    return there and any(step.name.isdecimal() for step in make_folder(checkpoints).iterdir())


def _is_config(path: Path) -> bool:
    """Whether it is a run's config.json."""
    try:
        recorded = readers.read_json(path)
    except UserError:
        return False
    return {"run", "data", "optimizer"} <= recorded.keys()


def _is_something(path: Path) -> bool:
    """Whether it is there, and no folder that is empty but for a lock."""
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
