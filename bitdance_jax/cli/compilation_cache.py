"""Compiled programs, kept between starts."""

import contextlib
import shutil
import warnings

import jax
from etils import epath
from filelock import FileLock, Timeout

from bitdance_jax.errors import FileError
from bitdance_jax.io import paths
from bitdance_jax.io.shared_folder import check_shared


MAX_BYTES = 2 * 2**30
"""Of a local folder; then the programs that were not used for longest are removed."""

FREE_BYTES = 2**29
"""The user's folder is not used on a disk with less free space."""


def keep_compiled(folder: str | None = None) -> None:
    """Makes JAX store compiled programs in a folder and load those stored there.

    JAX's own settings apply: JAX_ENABLE_COMPILATION_CACHE=0 stores and loads nothing, and
    JAX_COMPILATION_CACHE_MAX_SIZE is the limit of a local folder in bytes. Of several processes
    only the first writes, and all read.

    Args:
      folder: local or gs://; None: that of JAX_COMPILATION_CACHE_DIR, or for a single process
        `compiled` in the user's cache, if it can be written and the disk is not full.

    Raises:
      FileError: the folder cannot be written, or not all processes see the same one.
    """
    if folder is not None:
        made = paths.make_folder(folder)
        check_shared(made, "compilation_cache")
        _use(made)
    elif _is_enabled() and not _is_chosen() and jax.process_count() == 1:
        # No folder is better than no command.
        with contextlib.suppress(FileError, OSError, RuntimeError):
            made = paths.make_folder(paths.user_cache() / "compiled")
            if shutil.disk_usage(made).free >= FREE_BYTES:
                _use(made)
                warnings.filterwarnings("ignore", r"Error \w+ persistent compilation cache entry")


def _is_enabled() -> bool:
    return jax.config.values["jax_enable_compilation_cache"]


def _is_chosen() -> bool:
    return jax.config.values["jax_compilation_cache_dir"] is not None


def _use(folder: epath.Path) -> None:
    if paths.is_remote(folder):
        # Those of XLA are for local folders, as are the locks that a limit needs.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    elif jax.process_index() == 0:
        _remove_unfinished(folder)
        if jax.config.values["jax_compilation_cache_max_size"] == -1:
            jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default small programs are not stored; together they take seconds to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _remove_unfinished(folder: epath.Path) -> None:
    """Removes programs that a killed process, or a full disk, left incomplete.

    Otherwise JAX would neither read nor replace them. It writes NAME-cache and then NAME-atime.
    """
    try:
        with FileLock(folder / ".lockfile", timeout=10):  # JAX's own
            names = {path.name for path in folder.iterdir()}
            for name in names:
                stem = name.removesuffix("-cache")
                if stem != name and f"{stem}-atime" not in names:
                    (folder / name).unlink()
    except Timeout:
        return
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror or error}", folder) from error
