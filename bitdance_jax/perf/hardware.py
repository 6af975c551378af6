"""Peak arithmetic, memory and interconnect of TPUs and GPUs, and the memory of this machine.

The values are the manufacturers', for one JAX device: one chip, but half a chip of TPU v2, v3 and
7x. TPUs: docs.cloud.google.com/tpu/docs; NVIDIA GPUs: data sheets, dense (without sparsity).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitdance_jax.errors import ResourceError


GB, GIB, TERA = 1e9, 2.0**30, 1e12


@dataclass(frozen=True)
class Chip:
    """Peak rates and memory of one JAX device.

    Attributes:
      name: short name; for TPUs also the first part of a topology ("v5e" of "v5e:4x4").
      kinds: prefixes of `jax.Device.device_kind`.
      flops: bfloat16 operations a second; a multiply-add is two.
      memory: bytes of device memory.
      bandwidth: of that memory, bytes a second.
      link: bytes a second in one direction over one link: a TPU's ICI link to a neighbour, or a
        GPU's NVLink or PCIe to all others of its host.
      torus: dimensions of the TPU's network, 2 or 3; 0 for GPUs, which a switch connects.
      clock: hertz, to convert the TPU compiler's cycles to seconds; None for GPUs.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    link: float
    torus: int = 0
    clock: float | None = None


CHIPS = (
    Chip("v2", ("TPU v2",), 22.5 * TERA, 8 * GIB, 350 * GB, 62 * GB / 2, 2, 0.7e9),
    Chip("v3", ("TPU v3",), 61.5 * TERA, 16 * GIB, 450 * GB, 82 * GB / 2, 2, 0.94e9),
    Chip("v4", ("TPU v4",), 275 * TERA, 32 * GIB, 1228 * GB, 50 * GB, 3, 1.05e9),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197 * TERA, 16 * GIB, 819 * GB, 50 * GB, 2, 1.5e9),
    Chip("v5p", ("TPU v5",), 459 * TERA, 95 * GIB, 2765 * GB, 100 * GB, 3, 1.75e9),
    Chip("v6e", ("TPU v6",), 918 * TERA, 32 * GIB, 1638 * GB, 100 * GB, 2, 1.75e9),
    Chip("tpu7x", ("TPU7x",), 2307 * TERA / 2, 96 * GIB, 7380 * GB / 2, 100 * GB / 2, 3, 2.2e9),
    Chip("b200", ("NVIDIA B200", "NVIDIA GB200"), 2250 * TERA, 180 * GIB, 8000 * GB, 900 * GB),
    Chip("h200", ("NVIDIA H200", "NVIDIA GH200"), 989 * TERA, 141 * GB, 4800 * GB, 450 * GB),
    Chip("h100_pcie", ("NVIDIA H100 PCIe",), 756 * TERA, 80 * GIB, 2000 * GB, 64 * GB),
    Chip("h100", ("NVIDIA H100",), 989 * TERA, 80 * GIB, 3350 * GB, 450 * GB),
    Chip(
        "a100_40gb",
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        312 * TERA,
        40 * GIB,
        1555 * GB,
        300 * GB,
    ),
    Chip("a100", ("NVIDIA A100",), 312 * TERA, 80 * GIB, 2039 * GB, 300 * GB),
    Chip("l40s", ("NVIDIA L40S",), 362 * TERA, 48 * GB, 864 * GB, 32 * GB),
    Chip("l4", ("NVIDIA L4",), 121 * TERA, 24 * GB, 300 * GB, 32 * GB),
    Chip("a10", ("NVIDIA A10",), 125 * TERA, 24 * GB, 600 * GB, 32 * GB),
    Chip("rtx_4090", ("NVIDIA GeForce RTX 4090",), 165 * TERA, 24 * GB, 1008 * GB, 32 * GB),
    Chip("rtx_3090", ("NVIDIA GeForce RTX 3090",), 71 * TERA, 24 * GB, 936 * GB, 32 * GB),
)


def chip_of(device: Any) -> Chip | None:
    """The chip of a jax.Device, real or of a topology; None for a CPU or an unknown chip."""
    matches = [
        (len(kind), chip)
        for chip in CHIPS
        for kind in chip.kinds
        if device.device_kind.startswith(kind)
    ]
    return max(matches, key=lambda pair: pair[0])[1] if matches else None


def host_memory() -> float | None:
    """Bytes of this machine's memory that are free or can be freed; None if unknown."""
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", file.read_text()) if file.exists() else None
    return 1024 * float(found[1]) if found else None


def device_memory(device: Any) -> float | None:
    """Bytes of a device's memory that a program may use; None if unknown."""
    if device.platform == "cpu":
        available = host_memory()
        return available and available / jax.local_device_count()
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return float(limit)
    chip = chip_of(device)
    return chip.memory if chip else None


def check_fits(abstract: Any, what: str) -> None:
    """Checks that arrays fit the memory of a device of this process, before they are allocated.

    Args:
      abstract: pytree of jax.ShapeDtypeStruct; of a sharded one only a device's shard counts.
      what: name of the arrays in the message.

    Raises:
      ResourceError: they do not fit.
    """
    needed = float(sum(_bytes_on_a_device(leaf) for leaf in jax.tree.leaves(abstract)))
    device = jax.local_devices()[0]
    available = device_memory(device)
    if available is not None and needed > available:
        raise ResourceError(
            f"{what} takes {_gib(needed)} on each device, and {device.device_kind} has "
            f"{_gib(available)}; use a smaller model, or more devices (mesh.fsdp shards it over "
            "them in training)"
        )


def _bytes_on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    # Random keys have dtypes without an itemsize.
    size = leaf.dtype.itemsize if isinstance(leaf.dtype, np.dtype) else 4
    return math.prod(shape) * size


def _gib(count: float) -> str:
    return f"{count / GIB:,.1f} GiB" if count < 1e18 else f"{count / GIB:.1e} GiB"


def missing_devices() -> str | None:
    """An error message if JAX cannot find the devices of JAX_PLATFORMS; None if it can."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["JAX finds none"])[0]
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
        return (
            f"there is no device of JAX_PLATFORMS={platforms} ({reason}); "
            "install JAX for it, or unset JAX_PLATFORMS"
        )
    return None
