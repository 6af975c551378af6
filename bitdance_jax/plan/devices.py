"""The devices of a plan: this machine's, or a TPU slice that only libtpu's compiler knows."""

import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from bitdance_jax.errors import ConfigError
from bitdance_jax.perf.hardware import CHIPS
from bitdance_jax.perf.libtpu import ENVIRONMENT


MAX_CHIPS = 2**15
"""Of a topology. The largest pod has 9,216; libtpu would make a list of any length."""

_ENVIRONMENT = ENVIRONMENT | {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at the same time
}


def find_devices(topology: str | None) -> list[jax.Device]:
    """The devices of a topology such as "v5e:4x4", or this machine's for None.

    Call it before any other use of JAX.

    Raises:
      ConfigError: libtpu is not installed, or does not know the topology.
    """
    if topology is None:
        return jax.devices()
    chips = [chip.name for chip in CHIPS if chip.torus]
    name, _, layout = topology.partition(":")
    axes = layout.split("x") if re.fullmatch(r"\d{1,5}(x\d{1,5}){1,2}", layout, re.ASCII) else []
    if name not in chips or not 1 <= math.prod(map(int, axes or "0")) <= MAX_CHIPS:
        raise ConfigError(
            f"unknown topology {topology!r}; give a chip and its layout, such as v5e:4x4 or "
            f"v5p:4x4x8; chips: {', '.join(chips)}",
            "topology",
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("topology needs the TPU compiler: pip install libtpu", "topology")
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    # The two cores of a v4 are one device, as on Cloud TPUs.
    options = {"chip_config_name": "megacore"} if name == "v4" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"topology {topology}: {message}", "topology") from None
    return list(description.devices)
