"""Times the sampler at a released model's full size, with random weights, without the decoder.

python benchmarks/sampler.py --model b_16x --batch 4 --head-steps 10
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
from arithmetic import minimal_sampler_flops
from tqdm import tqdm

from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import ClassConditionalConfig, SamplerConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.models.class_conditional import ClassConditional, abstract_params
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.pipelines.batching import ImageKeys
from bitdance_jax.pipelines.programs import read_labels
from bitdance_jax.sampling.compiled import CompiledSampler, Inputs
from bitdance_jax.sampling.next_patch import resolve


@dataclass(frozen=True)
class Arguments:
    """Sampler benchmark.

    Attributes:
      model: a released size: b_1x, b_4x, b_16x, l_1x, ..., h_16x.
      batch: images at a time.
      head_steps: N of the head's solver.
      guidance: guidance scale, linear schedule; 1 for none.
      dtype: of weights and activations.
      runs: timed runs, after one that is not.
      profile: write a profiler trace of one more run to this folder.
    """

    model: str = "b_16x"
    batch: int = 4
    head_steps: int = 10
    guidance: float = 3.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    runs: int = 5
    profile: str | None = None

    def __post_init__(self) -> None:
        if min(self.batch, self.runs) < 1:
            raise UserError(f"batch and runs must be positive, got {self.batch} and {self.runs}")


def random_weights(config: ClassConditionalConfig, dtype: Any) -> Any:
    """Unrolled parameters of the model, normal with the scale that keeps activations near 1."""
    rng = np.random.default_rng(0)

    def normal(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = leaf.shape[0] if len(leaf.shape) > 1 else 1
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in), dtype)

    return jax.tree.map(normal, abstract_params(config, scan=False))


def main() -> None:
    arguments = parse(Arguments)
    config = ClassConditionalConfig.imagenet(arguments.model)
    sampler = SamplerConfig(head_steps=arguments.head_steps, guidance_scale=arguments.guidance)
    params = random_weights(config, jnp.dtype(arguments.dtype))
    inputs = Inputs(np.arange(arguments.batch, dtype=np.int32) % config.num_classes)
    solver, scales = resolve(sampler, config.head.time_shift, config.num_steps)
    read = functools.partial(
        read_labels, ClassConditional(config, dtype=jnp.dtype(arguments.dtype))
    )
    programs = CompiledSampler(read, make_mesh(devices=jax.devices()[:1]))
    keys = ImageKeys.checked(0, 0, arguments.batch).data(np.arange(arguments.batch))
    stop = np.int32(config.num_steps)

    start = time.perf_counter()
    begin = programs.begin.lower(params, inputs, scales).compile()
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        programs.begin.eval_shape(params, inputs, scales),
        begin.output_shardings,
    )
    advance = programs.advance.lower(
        params, state, inputs, keys, scales, stop, solver=solver
    ).compile()
    compile_seconds = time.perf_counter() - start

    def sample(seed: int) -> float:
        keys = ImageKeys.checked(seed, 0, arguments.batch).data(np.arange(arguments.batch))
        start = time.perf_counter()
        state = begin(params, inputs, scales)
        jax.block_until_ready(advance(params, state, inputs, keys, scales, stop))
        return time.perf_counter() - start

    sample(0)
    seconds = [sample(seed) for seed in tqdm(range(arguments.runs), desc="timing", unit="run")]
    if arguments.profile is not None:
        with jax.profiler.trace(arguments.profile):
            sample(0)

    traceable = functools.partial(programs.traceable, solver=solver)
    done = traced_flops(traceable, params, inputs, keys, scales)
    least = minimal_sampler_flops(config, sampler, arguments.batch)
    median, rates = statistics.median(seconds), sorted(arguments.batch / s for s in seconds)
    memory = advance.memory_analysis()  # None where the backend has no such values
    print(f"{arguments} on {jax.devices()[0].device_kind} ({jax.default_backend()})")
    print(f"compile     {compile_seconds:.1f} s")
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    print(f"batch       {median:.2f} s median of {arguments.runs}, {spread}")
    rate = statistics.median(rates)
    print(f"rate        {rate:.3f} images/s median, {rates[0]:.3f} to {rates[-1]:.3f}")
    share = f"{done / least:.4f} of the analytic minimum"
    print(f"arithmetic  {done / 1e12:.3f} TFLOP, {share}; {done / median / 1e9:.0f} GFLOP/s")
    if memory is not None:
        print(f"memory      {memory.temp_size_in_bytes / 2**20:.0f} MiB of temporaries")


if __name__ == "__main__":
    sys.exit(run(main))
