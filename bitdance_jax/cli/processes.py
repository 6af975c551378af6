"""One command in several processes, on as many hosts."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from bitdance_jax.cli.command_line import one_line
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.consistency import check_same_config
from bitdance_jax.errors import ConfigError


@contextlib.contextmanager
def together(arguments: Any, multi_host: bool) -> Iterator[int]:
    """Joins the other processes of a command, and gives their number. An error stops all of them.

    Args:
      arguments: the command's, which must be the same in all processes.
      multi_host: whether there are several processes.

    Raises:
      ConfigError: there are no others.
      UserError: the others cannot be reached or have other arguments.
    """
    if multi_host and not multihost.initialize():
        raise ConfigError(
            "multi_host finds no other processes; on each set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID",
            "multi_host",
        )
    with stop_all_on_error():
        if multi_host:
            check_same_config(arguments)
        yield jax.process_count() if multi_host else 1


def stop_all_on_error() -> contextlib.AbstractContextManager[None]:
    """`multihost.stop_all_on_error`, with the line that one process would print."""
    return multihost.stop_all_on_error(one_line)
