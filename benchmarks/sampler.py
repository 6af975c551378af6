"""Times class-conditional models at full size, with random weights: sampling, and pixels.

    python benchmarks/sampler.py --model b_16x --batch 4 --head-steps 10
    python benchmarks/sampler.py --model b_16x --batch 1 4 16 --pixels --json sampler.json

Prints a table with a row for each batch size, beside the share of the roofline: the time in which
this device would only compute the products, or only read the weights as often as they are used,
whichever is longer, at rates that are measured first. Pixels are not part of that share.
"""

import functools
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from arithmetic import minimal_sampler_flops, sampler_weight_bytes
from device_rates import Rates, measured_rates, report
from random_models import class_conditional_config, random_arrays
from tqdm import tqdm

from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import ClassConditionalConfig, SamplerConfig
from bitdance_jax.config.plain import Config, Count, PathName
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.models import class_conditional
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.pipelines.batching import ImageKeys
from bitdance_jax.pipelines.programs import Programs
from bitdance_jax.sampling.compiled import Inputs
from bitdance_jax.sampling.next_patch import resolve
from bitdance_jax.tokenizer import autoencoder


@dataclass(frozen=True)
class Arguments(Config):
    """Sampler benchmark.

    Attributes:
      model: a released size: b_1x, b_4x, b_16x, l_1x, ..., h_16x.
      batch: images at a time; several for a sweep.
      head_steps: N of the head's solver.
      guidance: guidance scale, linear schedule; 1 for none.
      dtype: of weights and activations.
      runs: timed runs of each batch size, after one that is not.
      pixels: decode the images too.
      profile: write a profiler trace of one more run of each to this folder.
      json: file to write every result to.
      trial: a toy model, to try this script.
    """

    model: str = "b_16x"
    batch: tuple[Count, ...] = (4,)
    head_steps: Count = 10
    guidance: float = 3.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    runs: Count = 5
    pixels: bool = False
    profile: PathName | None = None
    json: PathName | None = None
    trial: bool = False


def measure(
    config: ClassConditionalConfig,
    params: Any,
    decoder: Any,
    batch: int,
    arguments: Arguments,
    rates: Rates,
) -> dict[str, Any]:
    """Seconds of a batch of images on the first device, and to pixels if there is a decoder."""
    sampler = SamplerConfig(head_steps=arguments.head_steps, guidance_scale=arguments.guidance)
    dtype = jnp.dtype(arguments.dtype)
    inputs = Inputs(np.arange(batch, dtype=np.int32) % config.num_classes)
    solver, scales = resolve(sampler, config.head.time_shift, config.num_steps)
    mesh = make_mesh(devices=jax.devices()[:1])
    programs = Programs(config, mesh, dtype)
    stop = np.int32(config.num_steps)

    def sample(seed: int) -> tuple[float, float]:
        """Seconds until the codes, and from there to the pixels."""
        keys = ImageKeys.checked(seed, 0, batch).data(np.arange(batch))
        start = time.perf_counter()
        state = programs.sampler.begin(params, inputs, scales)
        state = programs.sampler.advance(params, state, inputs, keys, scales, stop, solver=solver)
        values = jax.block_until_ready(state.values)
        sampled = time.perf_counter()
        if decoder is not None:
            codes = programs.to_codes(values, stop, height=config.grid)
            jax.block_until_ready(programs.decode(decoder, codes, keys))
        return sampled - start, time.perf_counter() - sampled

    first = sum(sample(0))
    seconds = [sample(seed) for seed in range(arguments.runs)]
    if arguments.profile is not None:
        with jax.profiler.trace(arguments.profile):
            sample(0)
    codes, pixels = (statistics.median(parts) for parts in zip(*seconds, strict=True))
    total = [sum(parts) for parts in seconds]
    countable = Programs(config, mesh, dtype, kernel="xla").sampler
    traceable = functools.partial(countable.traceable, solver=solver)
    keys = ImageKeys.checked(0, 0, batch).data(np.arange(batch))
    flops = traced_flops(traceable, params, inputs, keys, scales)
    least = minimal_sampler_flops(config, sampler, batch)
    read = sampler_weight_bytes(params, config.num_steps, solver.num_evaluations)
    return {
        "batch": batch,
        "seconds": round(statistics.median(total), 3),
        "fastest_slowest": [round(min(total), 3), round(max(total), 3)],
        "pixel_seconds": None if decoder is None else round(pixels, 3),
        "images_per_second": round(batch / statistics.median(total), 3),
        "first_call_seconds": round(first, 1),
        "tflop": round(flops / 1e12, 3),
        "of_least_arithmetic": round(flops / least, 4),
        "roofline_share": round(rates.least_seconds(least, read) / codes, 3),
    }


def main() -> None:
    arguments = parse(Arguments, sys.argv[1:])
    config = class_conditional_config(arguments.model, arguments.trial)
    rates = measured_rates(arguments.dtype)
    dtype = jnp.dtype(arguments.dtype)
    params, decoder = (
        random_arrays(abstract, lambda path: dtype)
        for abstract in (
            class_conditional.abstract_params(config, scan=False),
            autoencoder.abstract_params(config.tokenizer) if arguments.pixels else None,
        )
    )
    results = [
        measure(config, params, decoder, batch, arguments, rates)
        for batch in tqdm(arguments.batch, "batch sizes", unit="size")
    ]
    head = ["batch", "seconds", "of them pixels", "images/s", "first call", "TFLOP", "roofline"]
    lines = [
        (
            str(result["batch"]),
            f"{result['seconds']:.2f}",
            "" if result["pixel_seconds"] is None else f"{result['pixel_seconds']:.2f}",
            f"{result['images_per_second']:.3g}",
            f"{result['first_call_seconds']:.1f}",
            f"{result['tflop']:.3f} ({result['of_least_arithmetic']:.3f} of the least)",
            f"{result['roofline_share']:.0%}",
        )
        for result in results
    ]
    report(arguments, rates, results, head, lines)


if __name__ == "__main__":
    sys.exit(run(main))
