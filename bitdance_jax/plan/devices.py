"""Devices to plan for: those of this machine, or a TPU slice that is not there, by libtpu's compiler."""

import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.perf.hardware import CHIPS
from bitdance_jax.perf.libtpu import ENVIRONMENT


MAX_CHIPS = 2**15
"""Of a topology; the largest pod has 9,216. libtpu would list as many as are asked for."""

_ENVIRONMENT = ENVIRONMENT | {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time
}


def find_devices(topology: str | None) -> list[jax.Device]:
    """The devices of a topology such as "v5e:4x4", or this machine's for None. Before anything else is asked of JAX.

    Raises:
      UserError: libtpu is not there, or does not know the topology.
    """
    if topology is None:
        return jax.devices()
    chips = [chip.name for chip in CHIPS if chip.torus]
    name, _, layout = topology.partition(":")
    axes = layout.split("x") if re.fullmatch(r"\d{1,5}(x\d{1,5}){1,2}", layout, re.ASCII) else []
    if name not in chips or not 1 <= math.prod(map(int, axes or "0")) <= MAX_CHIPS:
        raise UserError(
            f"unknown topology {topology!r}; a chip and its layout, such as v5e:4x4 or v5p:4x4x8; chips: {', '.join(chips)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("topology needs the TPU compiler: pip install libtpu", "topology")
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    options = (
        {"chip_config_name": "megacore"} if name == "v4" else {}
    )  # both cores of a v4 are one device, as on Cloud TPUs
    try:
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology {topology}: {reason}", "topology") from None
