"""libtpu on machines without a TPU: it is there as a compiler (`python -m bitdance_jax.plan`), and JAX asks it for devices all the same."""

import os
from collections.abc import Iterator
from pathlib import Path


ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no questions to a metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # else libtpu complains that it does not know; topologies do not depend on it
    "TPU_WORKER_HOSTNAMES": "localhost",
}

GOOGLE = "0x1ae0"
"""Vendor of TPUs on the PCI bus."""


SET_BY_JAX = {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}
"""Variables that say nothing of a TPU: JAX sets them when it is imported."""


def quiet_libtpu(root: Path = Path("/")) -> None:
    """Answers what libtpu complains not to know, where there is no TPU; elsewhere it is left to say what it has to.

    Args:
      root: of the file system in which a TPU would show.
    """
    if {
        name for name in os.environ if name.startswith("TPU_")
    } - SET_BY_JAX or "tpu" in os.environ.get("JAX_PLATFORMS", ""):
        return
    if not any(_signs(root)):
        os.environ.update(ENVIRONMENT)


def _signs(root: Path) -> Iterator[Path]:
    """Of TPUs: device files, and Google's devices on the bus."""
    yield from (root / "dev").glob("accel*")
    yield from (root / "dev" / "vfio").glob("[0-9]*")
    for vendor in (root / "sys" / "bus" / "pci" / "devices").glob("*/vendor"):
        try:
            kind = vendor.with_name("class").read_text()
            if vendor.read_text().strip() == GOOGLE and not kind.startswith(
                ("0x01", "0x02")
            ):  # disks and network cards of its cloud
                yield vendor
        except OSError:
            continue
