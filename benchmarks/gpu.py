"""Everything that one GPU can tell in ten minutes, in order of worth, as a table and a JSON file.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --only sample_b_16x train_b_1x
    python benchmarks/gpu.py --trial          # toy sizes, on any device, to try this script

Every part runs in a process of its own, with random weights: one that fails or takes too long
leaves the others as they are. Nothing is fetched.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from random_models import (
    class_conditional_config,
    prompt_weights,
    random_arrays,
    text_to_image_config,
    toy_tokenizer,
)
from text_to_image import measure, one_device

from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.config_file import load_config
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import (
    MeshConfig,
    SamplerConfig,
    TokenizerConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.distributed import sharding
from bitdance_jax.distributed.mesh import batch_sharding, make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.io import image_files
from bitdance_jax.models import class_conditional
from bitdance_jax.nn.attention import Kernel
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.perf.hardware import chip_of
from bitdance_jax.pipelines.batching import ImageKeys, image_keys
from bitdance_jax.pipelines.programs import Programs
from bitdance_jax.pipelines.tokenizer import decode_codes
from bitdance_jax.pipelines.weights import weight_dtype
from bitdance_jax.sampling.compiled import Inputs
from bitdance_jax.sampling.next_patch import resolve
from bitdance_jax.tokenizer import autoencoder, lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.train.performance import training_flops
from bitdance_jax.train.state import init_state, learning_rate_schedule, make_optimizer
from bitdance_jax.train.step import make_train_step


GOLDEN_TESTS = (
    "tests/heads",
    "tests/models",
    "tests/nn",
    "tests/tokenizer",
    "tests/transformer",
    "tests/sampling",
)
GUIDANCE = {"b_16x": 6.1, "b_4x": 3.9, "b_1x": 3.2, "l_1x": 4.0, "h_1x": 4.55}
"""The scales of the paper's FIDs (paper 4.2)."""

GOLDEN_SECONDS = 165

Result = dict[str, Any]


@dataclass(frozen=True)
class Arguments:
    """GPU benchmark.

    Attributes:
      only: parts to run, in this order; all if left out.
      skip: parts to leave out.
      minutes: for all parts together; those that do not fit any more are left out.
      part_minutes: for one part.
      json: file to write every result to.
      trial: toy sizes, to try the script itself.
      worker: (used by the script itself) run this part here and write its result to `json`.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    minutes: float = 10.0
    part_minutes: float = 3.0
    json: str | None = None
    trial: bool = False
    worker: str | None = None

    def __post_init__(self) -> None:
        names = [*self.only, *self.skip, *([self.worker] if self.worker else [])]
        unknown = [name for name in names if name not in PARTS]
        if unknown:
            raise UserError(f"unknown part {unknown[0]}; known: {', '.join(PARTS)}")


@dataclass
class Timer:
    """Median seconds of calls after a first one, and of the compilation."""

    compile_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.compile_seconds += time.perf_counter() - start

    def measure(self, call: Callable[[], Any], budget: float = 10.0, most: int = 20) -> float:
        """Calls until `budget` seconds have gone, three times at least."""
        jax.block_until_ready(call())
        begin = time.perf_counter()
        while len(self.seconds) < 3 or (
            time.perf_counter() - begin < budget and len(self.seconds) < most
        ):
            start = time.perf_counter()
            jax.block_until_ready(call())
            self.seconds.append(time.perf_counter() - start)
        return statistics.median(self.seconds)


def kernels(call: Callable[[], Any], top: int = 12) -> Result:
    """Where one call's time goes on a GPU: seconds of its kernels, and the longest of them.

    Kernels whose names differ by a number count together: milliseconds, and how many there were.
    """
    if jax.default_backend() != "gpu":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        wall = time.perf_counter() - start
        total: collections.Counter[str] = collections.Counter()
        count: collections.Counter[str] = collections.Counter()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    if not line.name.startswith("Stream"):
                        continue
                    for event in line.events:
                        name = re.sub(r"[._]?\d+$", "", event.name[:60])
                        total[name] += event.duration_ns
                        count[name] += 1
    longest = [[name, round(ns / 1e6, 2), count[name]] for name, ns in total.most_common(top)]
    seconds = sum(total.values()) / 1e9
    return {
        "traced_seconds": round(wall, 3),
        "kernel_seconds": round(seconds, 3),
        "kernels": sum(count.values()),
        "longest_ms": longest,
    }


def device_result() -> Result:
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {} if peak is None else {"peak_memory_gib": round(peak / 2**30, 2)}


# ------------------------------------------------------------------ parts


def golden(trial: bool) -> Result:
    """The tests against recorded tensors, on this device, several at a time where possible."""
    tests = ["tests/nn/test_attention.py"] if trial else [*GOLDEN_TESTS, "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-v", *tests]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, (os.cpu_count() or 2) - 2))]
    platform = jax.default_backend()
    flags = "--xla_gpu_autotune_level=0"  # the tests compile more than they compute
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cuda,cpu" if platform == "gpu" else platform,
        "XLA_FLAGS": flags if platform == "gpu" else os.environ.get("XLA_FLAGS", ""),
    }
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=GOLDEN_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then says what it has seen
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    print(output[-20000:])
    # Line by line: a run that was interrupted has no summary.
    passed = re.findall(r"^.*\bPASSED\b", output, re.MULTILINE)
    failed = re.findall(r"^.*\b(?:FAILED|ERROR)\b.*::.*$", output, re.MULTILINE)
    return {
        "passed": len(passed),
        "failed": sorted({line[line.index("tests/") :].split()[0] for line in failed}),
        "complete": process.returncode in (0, 1),
    }


def sample(name: str, *, head_steps: tuple[int, ...], pixels: bool = False) -> Any:
    """Codes, and pixels, of 64 images at a time, guided, in bfloat16."""

    def part(trial: bool) -> Result:
        config = class_conditional_config(name, trial)
        batch, dtype = (2 if trial else 64), jnp.bfloat16
        abstract = class_conditional.abstract_params(config, scan=False)
        params = random_arrays(abstract, lambda path: weight_dtype(path, dtype))
        decoder = random_arrays(autoencoder.abstract_params(config.tokenizer), lambda path: dtype)
        labels = np.arange(batch, dtype=np.int32) % config.num_classes
        keys = ImageKeys.checked(0, 0, batch).data(np.arange(batch))
        mesh = make_mesh(devices=jax.devices()[:1])
        programs = Programs(config, mesh, jnp.dtype(dtype))
        countable = Programs(config, mesh, jnp.dtype(dtype), kernel="xla").sampler
        compiled_sampler = programs.sampler
        result: Result = {"batch": batch}
        for steps in (2,) if trial else head_steps:
            sampler = SamplerConfig(head_steps=steps, guidance_scale=GUIDANCE[name])
            solver, scales = resolve(sampler, config.head.time_shift, config.num_steps)
            call = functools.partial(
                compiled_sampler.sample,
                params,
                Inputs(labels),
                keys,
                solver=solver,
                scales=scales,
                num_patches=config.num_steps,
            )
            traceable = functools.partial(countable.traceable, solver=solver)
            flops = traced_flops(traceable, params, Inputs(labels), keys, scales)
            timer = Timer()
            with timer.compiling():
                jax.block_until_ready(call())
            seconds = timer.measure(call, budget=4.0)
            result[f"{steps}_steps"] = {
                "images_per_second": round(batch / seconds, 2),
                "seconds": round(seconds, 4),
                "first_call_seconds": round(timer.compile_seconds, 1),
                "tflops": round(flops / seconds / 1e12, 1),
            }
        result |= kernels(call)
        if not pixels:
            return {**result, **device_result()}
        codes = programs.to_codes(call(), np.int32(config.num_steps), height=config.grid)
        seconds = Timer().measure(lambda: programs.decode(decoder, codes, keys), budget=2.0)
        return {**result, "decode_seconds": round(seconds, 4), **device_result()}

    return part


def train(name: str, batch_size: int, *, attention: Kernel) -> Any:
    """A training step from tokens, in bfloat16 with float32 weights, as in the paper's recipe."""

    def part(trial: bool) -> Result:
        config: Any = load_config(f"imagenet_{name}")[0]
        size = 2 if trial else batch_size
        run_config = dataclasses.replace(config.run, attention="xla" if trial else attention)
        config = dataclasses.replace(
            config,
            run=run_config,
            model=class_conditional_config(name, trial),
            data=DataConfig(source="tokens", path="made up", batch_size=size),
        )
        mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:1])
        objective = config.make_objective()
        schedule = learning_rate_schedule(config.optimizer, config.run.steps)
        optimizer = make_optimizer(config.optimizer, schedule, objective)
        decay = config.optimizer.ema_decay
        step: Any = make_train_step(objective, optimizer, schedule, mesh=mesh, ema_decay=decay)
        state = jax.jit(lambda key: init_state(objective, optimizer, key))(jax.random.key(0))
        state = jax.device_put(state, sharding.shardings(mesh, state))
        rng = np.random.default_rng(0)
        batch = {
            key: rng.integers(0, 256 if key == "codes" else 1000, leaf.shape).astype(leaf.dtype)
            for key, leaf in objective.abstract_batch(size).items()
        }
        batch = jax.device_put(batch, batch_sharding(mesh))
        key = jax.random.key(1)
        timer = Timer()
        with timer.compiling():
            compiled = step.lower(state, {}, batch, key).compile()
        losses = []

        def call() -> Any:
            nonlocal state
            state, metrics = compiled(state, {}, batch, key)
            losses.append(metrics["loss"])
            return metrics

        seconds = timer.measure(call, budget=6.0, most=10)
        flops = training_flops(objective, size)
        result: Result = {
            "batch": size,
            "images_per_second": round(size / seconds, 1),
            "seconds": round(seconds, 4),
            "compile_seconds": round(timer.compile_seconds, 1),
            "tflops": round(flops / seconds / 1e12, 1),
            "loss_first_last": [float(losses[0]), float(losses[-1])],
        }
        chip = chip_of(jax.devices()[0])
        if chip:
            result["model_flop_utilisation"] = round(flops / seconds / chip.flops, 3)
        return {**result, **device_result(), **kernels(call)}

    return part


def draw_prompt(name: str, weights: str) -> Any:
    """One 1024 x 1024 image of a prompt of 60 tokens: 50 head steps, guidance 7.5."""

    def part(trial: bool) -> Result:
        side = 256 if trial else 1024
        config, mesh = text_to_image_config(name, trial), one_device()
        result = measure(
            config,
            prompt_weights(config, mesh, jnp.dtype(jnp.bfloat16), weights),
            mesh,
            size=(side, side),
            batch=1,
            sampler=SamplerConfig(
                head_steps=2 if trial else 50, guidance_scale=7.5, guidance_schedule="constant"
            ),
            weights=weights,
            dtype="bfloat16",
            runs=2,
        )
        return {**result, **device_result()}

    return part


def tokenizer(trial: bool) -> Result:
    """d16c32 at 256 x 256 in bfloat16: images a second, encoder and decoder apart."""
    config = toy_tokenizer() if trial else TokenizerConfig.d16c32()
    batch, dtype = (2 if trial else 32), jnp.bfloat16
    params = random_arrays(autoencoder.abstract_params(config), lambda path: dtype)
    model = Autoencoder(config, dtype)
    images = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), np.uint8)

    def encode(params: Any, images: Any) -> Any:
        z: Any = model.apply({"params": params}, image_files.to_model(images), method="encode")
        return lfq.quantize(z).astype(jnp.int8)

    encode_jit = jax.jit(encode)
    decode_jit = jax.jit(lambda p, codes, keys: decode_codes(model, p, codes, keys))
    keys = image_keys(0, 0, batch)
    codes = encode_jit(params, images)
    arrays = jax.device_put(images)
    encode_seconds = Timer().measure(lambda: encode_jit(params, arrays), budget=3.0)
    decode_seconds = Timer().measure(lambda: decode_jit(params, codes, keys), budget=3.0)
    return {
        "encode_images_per_second": round(batch / encode_seconds, 1),
        "decode_images_per_second": round(batch / decode_seconds, 1),
        **device_result(),
    }


PARTS: dict[str, Callable[[bool], Result]] = {
    "golden": golden,
    "sample_b_16x": sample("b_16x", head_steps=(100, 25), pixels=True),
    "train_b_1x": train("b_1x", 256, attention="cudnn"),
    "t2i_14b_64x": draw_prompt("14b_64x", "bfloat16"),
    "sample_b_4x": sample("b_4x", head_steps=(25,)),
    "sample_b_1x": sample("b_1x", head_steps=(25,)),
    "train_h_1x": train("h_1x", 128, attention="cudnn"),
    "t2i_14b_64x_int8": draw_prompt("14b_64x", "int8"),
    "t2i_14b_64x_int4": draw_prompt("14b_64x", "int4"),
    "train_b_16x": train("b_16x", 256, attention="cudnn"),
    "train_b_1x_xla": train("b_1x", 256, attention="xla"),
    "tokenizer": tokenizer,
    "train_h_1x_xla": train("h_1x", 128, attention="xla"),
    "train_b_16x_xla": train("b_16x", 256, attention="xla"),
    "t2i_14b_16x": draw_prompt("14b_16x", "bfloat16"),
}
"""In order of worth."""


def work(arguments: Arguments) -> None:
    assert arguments.worker is not None and arguments.json is not None
    result = PARTS[arguments.worker](arguments.trial)
    Path(arguments.json).write_text(json.dumps(result))


def run_part(name: str, arguments: Arguments, seconds: float) -> Result:
    """The part's result, or why there is none."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", name, "--json", str(out)]
        command += ["--trial"] if arguments.trial else []
        # The tests are several processes that share the GPU.
        share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if name == "golden" else {}
        environment = {**os.environ, **share}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, env=environment
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
        took = round(time.perf_counter() - start, 1)
        if name == "golden":
            print(done.stdout, flush=True)
        if out.exists():
            return {**json.loads(out.read_text()), "part_seconds": took}
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        print("\n".join(lines[-12:]), flush=True)
        return {"failed": lines[-1][:500] if lines else "no output", "part_seconds": took}


def table(results: dict[str, Result]) -> str:
    lines = []
    for name, result in results.items():
        words = " ".join(f"{key}={value}" for key, value in result.items())
        lines.append(f"{name:<20} {words}")
    return "\n".join(lines)


def main() -> None:
    arguments = parse(Arguments)
    if arguments.worker is not None:
        return work(arguments)
    names = [name for name in arguments.only or PARTS if name not in arguments.skip]
    results: dict[str, Result] = {}
    end = time.perf_counter() + 60 * arguments.minutes
    for name in names:
        left = min(end - time.perf_counter(), 60 * arguments.part_minutes)
        if left < 20:
            results[name] = {"failed": "no time left"}
        else:
            results[name] = run_part(name, arguments, left)
        print(f"{name}: {results[name]}", flush=True)
        if arguments.json is not None:
            Path(arguments.json).write_text(json.dumps(results, indent=1))
    print(table(results))
    return None


if __name__ == "__main__":
    sys.exit(run(main))
