"""Settings for libtpu on machines without a TPU, where it serves only as a compiler (`plan`).

JAX asks libtpu for devices there too, and libtpu then complains about what it does not know.
"""

import os
from collections.abc import Iterator
from pathlib import Path


ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no queries to a metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # any value stops the complaint
    "TPU_WORKER_HOSTNAMES": "localhost",
}

SET_BY_JAX = {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}
"""Variables that JAX sets when it is imported, with or without a TPU."""

GOOGLE = "0x1ae0"
"""PCI vendor id of TPUs."""


def quiet_libtpu(root: Path = Path("/")) -> None:
    """Sets ENVIRONMENT, unless the machine has a TPU or the user's variables ask for one.

    Args:
      root: of the file system that is searched for a TPU.
    """
    variables = {name for name in os.environ if name.startswith("TPU_")} - SET_BY_JAX
    if variables or "tpu" in os.environ.get("JAX_PLATFORMS", ""):
        return
    if not any(_find_tpus(root)):
        os.environ.update(ENVIRONMENT)


def _find_tpus(root: Path) -> Iterator[Path]:
    """Device files of TPUs, and Google's devices on the PCI bus."""
    yield from (root / "dev").glob("accel*")
    yield from (root / "dev" / "vfio").glob("[0-9]*")
    for vendor in (root / "sys" / "bus" / "pci" / "devices").glob("*/vendor"):
        try:
            # Google Cloud's disks (class 01) and network cards (02) have the same vendor.
            kind = vendor.with_name("class").read_text()
            if vendor.read_text().strip() == GOOGLE and not kind.startswith(("0x01", "0x02")):
                yield vendor
        except OSError:
            continue
