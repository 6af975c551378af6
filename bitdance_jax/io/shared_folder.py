"""A folder that all processes of a job use."""

import secrets

import jax
from etils import epath

from bitdance_jax.distributed import multihost
from bitdance_jax.errors import FileError


def check_shared(folder: epath.Path, field: str) -> None:
    """Checks that all processes have access to the same folder. Every process calls this.

    Args:
      folder: exists.
      field: of a config, that names the folder.

    Raises:
      FileError: in all processes: they do not.
    """
    if jax.process_count() == 1:
        return

    def marker(number: int) -> epath.Path:
        return folder / f".shared_{number}"

    def write_marker() -> int:
        number = secrets.randbelow(2**31)
        marker(number).write_text("")
        return number

    written = marker(multihost.on_process_0(write_marker))
    shared = multihost.all_true(written.exists())
    if jax.process_index() == 0:
        written.unlink()
    if not shared:
        raise FileError(
            f"not all processes see the same {folder}; set {field} to a folder that all hosts "
            "share, or to gs://BUCKET/FOLDER",
            folder,
        )
