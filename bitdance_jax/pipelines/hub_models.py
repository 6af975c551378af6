"""Models of the Hugging Face hub, downloaded and converted once into a cache."""

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from bitdance_jax.config.plain import checked, require
from bitdance_jax.convert.convert import convert
from bitdance_jax.errors import FileError
from bitdance_jax.io import model_folder, paths
from bitdance_jax.io.model_folder_hints import MODELS


HUB_ID = re.compile(r"[\w-][\w.-]*/(?!model$)[\w-][\w.-]*(/[\w./-]+\.\w+)?")
"""OWNER/REPOSITORY or OWNER/REPOSITORY/FILE; RUN/model is the folder of a run's model."""


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a repository or its file rather than a local path.

    Not if there is such a path, or a folder with the owner's name, or under `models/` and `runs/`,
    where folders may still be missing.
    """
    owner = name.partition("/")[0]
    local = owner in (MODELS, "runs") or Path(owner).exists() or Path(name).exists()
    return not local and HUB_ID.fullmatch(name) is not None


def cached(name: str) -> Path:
    """The model folder of a hub id in the cache, which may not be there yet."""
    return paths.user_cache() / "models" / name.replace("/", "--")


def local_folder(name: Any) -> str:
    """The folder of a model that a user names, of whatever form.

    For a hub id it is in the cache; a missing one is downloaded and converted first. Processes of
    one machine wait for the one that converts. An incomplete conversion is not used.

    Raises:
      UserError: it is no name, or the model cannot be downloaded, converted or written.
    """
    name = paths.expand(checked(str, name, "folder"))
    require(name != "", "folder is empty; name a model folder, or 'emoji'", "folder")
    if not is_hub_id(name):
        return name
    folder = cached(name)
    try:
        # It stays when the download fails: others may be waiting for the lock in it.
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock")
        with FileLock(lock), contextlib.ExitStack() as stack:
            # Runs before the lock is released, while no other process can hold it.
            stack.callback(lock.unlink, missing_ok=True)
            if not model_folder.is_model_folder(folder):
                print(f"{name} is converted once, into {folder}", file=sys.stderr)
                with contextlib.redirect_stdout(sys.stderr):
                    convert(name, str(folder))
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror or error}", folder) from error
    return str(folder)
