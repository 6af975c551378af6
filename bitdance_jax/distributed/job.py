"""What one process knows of its job before JAX starts."""

from typing import NamedTuple


class Job(NamedTuple):
    """The processes that train or sample together.

    Attributes:
      host: of process 0.
      port: at which process 0 listens.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.
    """

    host: str
    port: int
    num_processes: int
    process_id: int

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
