"""What a device does at most, measured on it: the roofline that benchmarks are compared with."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bitdance_jax.io.atomic import replace_file
from bitdance_jax.plan.report import table


@dataclass(frozen=True)
class Rates:
    """Of one device.

    Attributes:
      flops: operations a second of a large matrix product; a multiply-add is two.
      bandwidth: bytes a second of reading a large array.
    """

    flops: float
    bandwidth: float

    def least_seconds(self, flops: float, weight_bytes: float) -> float:
        """The time of a program that is limited by nothing else."""
        return max(flops / self.flops, weight_bytes / self.bandwidth)


def measured_rates(dtype: DTypeLike) -> Rates:
    """The rates of JAX's first device in a type, in a few seconds."""
    on_cpu = jax.default_backend() == "cpu"
    side = 2048 if on_cpu else 8192
    matrix = jnp.ones((side, side), dtype)
    product = _best_seconds(jax.jit(jnp.matmul), matrix, matrix)
    read = jnp.ones(2**27 if on_cpu else 2**30, jnp.float32)
    reading = _best_seconds(jax.jit(jnp.max), read)
    return Rates(2 * side**3 / product, read.nbytes / reading)


def report(
    arguments: Any,
    rates: Rates,
    results: Sequence[dict[str, Any]],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> None:
    """Prints a benchmark's table, and writes its results to `arguments.json` if that is given."""
    device = jax.devices()[0]
    print(f"{arguments} on {device.device_kind} ({device.platform})")
    print(f"{rates.flops / 1e12:.2f} TFLOP/s, {rates.bandwidth / 1e9:.0f} GB/s, as measured")
    print("\n".join(table(head, rows)))
    if arguments.json is not None:
        content = {
            "arguments": asdict(arguments),
            "device": device.device_kind,
            "rates": asdict(rates),
            "results": results,
        }
        with replace_file(Path(arguments.json)) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")


def _best_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
