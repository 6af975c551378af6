"""Times text-to-image models at full size, with random weights: prompt, patches and pixels.

    python benchmarks/text_to_image.py                                  # 14B-64x, 1024 px, a GPU
    python benchmarks/text_to_image.py --batch 1 2 4 --weights int8
    python benchmarks/text_to_image.py --model 0.6b_16x --size 256x256 --head-steps 10    # a CPU

Prints a table with a row for each batch size, beside the share of the roofline: the time in which
this device would only compute the products, or only read the weights as often as they are used,
whichever is longer, at rates that are measured first. Writes the same to `--json`.
"""

import functools
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from arithmetic import sampler_weight_bytes
from device_rates import Rates, measured_rates, report
from jax.sharding import Mesh
from random_models import prompt_weights, text_to_image_config
from tqdm import tqdm

from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import MeshConfig, SamplerConfig, TextToImageConfig
from bitdance_jax.config.plain import Config, Count, PathName
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.models import prompt_rows, text_to_image
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.pipelines import checks, memory
from bitdance_jax.pipelines.batching import ImageKeys
from bitdance_jax.pipelines.programs import Programs
from bitdance_jax.pipelines.weights import WeightType
from bitdance_jax.sampling.compiled import Inputs
from bitdance_jax.sampling.next_patch import resolve


PROMPT_TOKENS = 60
UNCONDITIONAL_TOKENS = 3


@dataclass(frozen=True)
class Arguments(Config):
    """Text-to-image benchmark.

    Attributes:
      model: a released model, 14b_16x or 14b_64x, or the same from another Qwen3: 0.6b_16x, ...
      batch: images at a time; several for a sweep.
      size: WIDTHxHEIGHT of the images in pixels.
      head_steps: N of the head's solver.
      guidance: guidance scale, constant; 1 for none.
      weights: how weights are stored.
      dtype: of activations.
      runs: timed runs, after one that is not.
      json: file to write every result to.
      trial: a toy model, to try this script.
    """

    model: str = "14b_64x"
    batch: tuple[Count, ...] = (1,)
    size: str = "1024x1024"
    head_steps: Count = 50
    guidance: float = 7.5
    weights: WeightType = "bfloat16"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    runs: Count = 2
    json: PathName | None = None
    trial: bool = False


def one_device() -> Mesh:
    """A mesh of the first device, which weights are stored for."""
    return make_mesh(MeshConfig(data=1, tensor=-1), jax.devices()[:1])


def measure(
    config: TextToImageConfig,
    params: Any,
    mesh: Mesh,
    *,
    size: tuple[int, int],
    batch: int,
    sampler: SamplerConfig,
    weights: str,
    dtype: str,
    runs: int,
    rates: Rates | None = None,
) -> dict[str, Any]:
    """Seconds of sampling a batch of prompts of 60 tokens, the best of `runs`.

    Args:
      config: of the model.
      params: its weights (`random_models.prompt_weights`).
      mesh: of the first device.
      size: height and width in pixels.
      batch: number of images.
      sampler: of the head.
      weights, dtype: see `Arguments`.
      runs: that are timed.
      rates: adds the share of the roofline.
    """
    height, width = size
    prompts = [[1] * PROMPT_TOKENS] * batch + [[1] * UNCONDITIONAL_TOKENS] * batch
    rows = prompt_rows.prefix_rows(config, prompts, height, width)
    streams = tuple(
        jax.tree.map(lambda x, i=i: x[i * batch : (i + 1) * batch], rows) for i in range(2)
    )
    inputs = Inputs(streams, text_to_image.token_positions(config, height, width))
    keys = ImageKeys.checked(0, 0, batch).data(np.arange(batch))
    programs = Programs(config, mesh, jnp.dtype(dtype))
    patches = height * width // config.size_multiple**2
    solver, scales = resolve(sampler, config.head.time_shift, patches)
    grid = height // config.tokenizer.downsampling

    def draw() -> list[float]:
        times = [time.perf_counter()]
        state = programs.sampler.begin(params["model"], inputs, scales)
        jax.block_until_ready(state)
        times.append(time.perf_counter())
        state = programs.sampler.advance(
            params["model"], state, inputs, keys, scales, np.int32(patches), solver=solver
        )
        jax.block_until_ready(state)
        times.append(time.perf_counter())
        codes = programs.to_codes(state.values, np.int32(patches), height=grid)
        jax.block_until_ready(programs.decode(params["tokenizer"], codes, keys))
        times.append(time.perf_counter())
        return np.diff(times).tolist()

    compiling = draw()
    best = min((draw() for _ in range(runs)), key=sum)
    setting = memory.Setting(config, weights, dtype, mesh.devices.shape, size, batch, sampler)
    result: dict[str, Any] = {
        "batch": batch,
        "seconds": round(sum(best), 3),
        "seconds_per_image": round(sum(best) / batch, 3),
        "prompt_patches_decoder_seconds": [round(part, 3) for part in best],
        "first_call_seconds": round(sum(compiling), 1),
        "estimated_memory_gib": round(sum(memory.needed(setting)) / 2**30, 2),
    }
    if rates is not None:
        countable = Programs(config, mesh, jnp.dtype(dtype), kernel="xla").sampler
        traceable = functools.partial(countable.traceable, solver=solver)
        flops = traced_flops(traceable, params["model"], inputs, keys, scales)
        read = sampler_weight_bytes(params["model"], patches, solver.num_evaluations)
        least = rates.least_seconds(flops, read)
        result["roofline_share"] = round(least / sum(best[:2]), 3)
    return result


def main() -> None:
    arguments = parse(Arguments, sys.argv[1:])
    config = text_to_image_config(arguments.model, arguments.trial)
    size = checks.parse_size(arguments.size)
    text_to_image.check_size(config, *size)
    sampler = SamplerConfig(
        head_steps=arguments.head_steps,
        guidance_scale=arguments.guidance,
        guidance_schedule="constant",
    )
    rates = measured_rates(arguments.dtype)
    mesh = one_device()
    params = prompt_weights(config, mesh, jnp.dtype(arguments.dtype), arguments.weights)
    results = [
        measure(
            config,
            params,
            mesh,
            size=size,
            batch=batch,
            sampler=sampler,
            weights=arguments.weights,
            dtype=arguments.dtype,
            runs=arguments.runs,
            rates=rates,
        )
        for batch in tqdm(arguments.batch, "batch sizes", unit="size")
    ]
    head = ["batch", "seconds", "an image", "prompt, patches, pixels", "roofline", "GiB, estimated"]
    lines = [
        (
            str(result["batch"]),
            f"{result['seconds']:.2f}",
            f"{result['seconds_per_image']:.2f}",
            ", ".join(f"{part:.2f}" for part in result["prompt_patches_decoder_seconds"]),
            f"{result['roofline_share']:.0%}",
            f"{result['estimated_memory_gib']:.1f}",
        )
        for result in results
    ]
    report(arguments, rates, results, head, lines)


if __name__ == "__main__":
    sys.exit(run(main))
