"""Plans of text-to-image sampling: the three programs that generate a batch of prompts."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from bitdance_jax.config import MeshConfig, SamplerConfig, TextToImageConfig, from_dict
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder
from bitdance_jax.models import text_to_image as model
from bitdance_jax.models.text_to_image import Prefixes
from bitdance_jax.nn.quantize import quantize
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.pipelines.checks import parse_size
from bitdance_jax.pipelines.programs import Programs, read_prompts
from bitdance_jax.pipelines.text_to_image import ALL_DEVICES, RELEASED_SAMPLER
from bitdance_jax.pipelines.tokenizer import chunk_size, decode_codes
from bitdance_jax.pipelines.weights import WeightType, stored_as
from bitdance_jax.plan import report
from bitdance_jax.plan.analysis import Plan, make_plan
from bitdance_jax.plan.programs import Program
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.compiled import Inputs
from bitdance_jax.sampling.guidance import rows_of_image
from bitdance_jax.tokenizer import autoencoder
from bitdance_jax.tokenizer.autoencoder import Autoencoder


BOUNDS = {
    "overlapped": "all overlaps, s an image",
    "scheduled": "roofline",
    "serial": "nothing overlaps",
    "compiler": "compiler",
}
"""Titles of `Estimate.bounds` in a table."""


@dataclass(frozen=True)
class Setting:
    """How a text-to-image model generates a batch of prompts.

    Attributes:
      size: WIDTHxHEIGHT in pixels.
      batch_size: images generated at a time, on all devices together.
      weights: the type of the weights in memory.
      dtype: compute type.
      prompt_tokens: length of the longest prompt, with its template.
      sampler: steps and guidance.
      mesh: how the devices share the work.
    """

    size: str = "1024x1024"
    batch_size: int = 1
    weights: WeightType = "bfloat16"
    dtype: str = "bfloat16"
    prompt_tokens: int = 60
    sampler: SamplerConfig = RELEASED_SAMPLER
    mesh: MeshConfig = ALL_DEVICES


class BatchPlan(NamedTuple):
    """Plans of the programs that generate one batch on a mesh.

    Attributes:
      plans: of the prompts, the patches, and the decoder.
      calls: how often each runs.
      images: of the batch.
      weight_seconds: to read the weights from memory: the head's for every evaluation, the others
        for every patch; None if the chip is unknown.
    """

    plans: tuple[Plan, Plan, Plan]
    calls: tuple[int, int, int]
    images: int
    weight_seconds: float | None

    def seconds(self, bound: str) -> float | None:
        """Seconds of one image, by one of `Estimate.bounds`; None if unknown."""
        bounds = [plan.estimate.bounds for plan in self.plans if plan.estimate]
        if len(bounds) < len(self.plans) or bound not in bounds[0]:
            return None
        calls = zip(self.calls, bounds, strict=True)
        return sum(count * each[bound] for count, each in calls) / self.images


def find_model(name: str) -> TextToImageConfig | None:
    """The config of "14b_16x", "14b_64x" or a model folder; None if `name` is none of these."""
    released = name.lower().replace("-", "_").removeprefix("bitdance_")
    if released in ("14b_16x", "14b_64x"):
        return TextToImageConfig.released(released)
    if not Path(name).is_dir():
        return None
    return from_dict(
        TextToImageConfig,
        model_folder.read_config(name, expect="text_to_image").config,
        f"{name}/config.json: config",
    )


def check(setting: Setting, config: TextToImageConfig) -> None:
    """Raises a UserError for a size that the model cannot generate."""
    model.check_size(config, *parse_size(setting.size))


def describe(
    setting: Setting, config: TextToImageConfig, devices: list[jax.Device], top: int = 10
) -> dict[str, Any]:
    """Prints the plan of a batch; returns it for a JSON file."""
    check(setting, config)
    mesh = make_mesh(setting.mesh, devices)
    print(
        f"compiling three programs for {mesh.size} x {devices[0].device_kind}; this takes minutes",
        file=sys.stderr,
    )
    batch = plan_batch(setting, config, mesh)
    for plan in batch.plans:
        print(report.to_text(plan, top) + "\n")
    print("\n".join(summary(batch)))
    return {
        "programs": [report.to_dict(plan, top) for plan in batch.plans],
        **_to_dict(batch),
    }


def compare(
    setting: Setting, config: TextToImageConfig, devices: list[jax.Device]
) -> dict[str, Any]:
    """Prints how fast each mesh generates a batch, fastest first; returns it for a JSON file."""
    check(setting, config)
    batches: list[tuple[str, BatchPlan]] = []
    decoder: Plan | None = None
    refused: dict[str, str] = {}
    rows = setting.batch_size * rows_of_image(setting.sampler)
    meshes = [
        MeshConfig(data=data, tensor=len(devices) // data)
        for data in range(1, len(devices) + 1)
        if len(devices) % data == 0
    ]
    for mesh in tqdm([mesh for mesh in meshes if rows % mesh.data == 0], dynamic_ncols=True):
        name = f"mesh.data={mesh.data} mesh.tensor={mesh.tensor}"
        try:
            batches.append((name, plan_batch(setting, config, make_mesh(mesh, devices), decoder)))
            decoder = batches[-1][1].plans[2]  # It is sharded over all devices on every mesh.
        except UserError as error:
            refused[name] = str(error)
    batches.sort(key=lambda pair: max(pair[1].seconds(bound) or 0.0 for bound in BOUNDS))
    print("\n".join(_times_table(batches)) if batches else "nothing fits")
    for name, reason in refused.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return {
        "batches": [{"name": name, **_to_dict(batch)} for name, batch in batches],
        "refused": refused,
    }


def summary(batch: BatchPlan) -> list[str]:
    """Lines of a table: memory, and seconds an image as multiples of reading the weights."""
    mesh = batch.plans[0].program.mesh
    layout = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return [
        f"a batch of {batch.images} on {mesh.size} x {mesh.devices.flat[0].device_kind}, "
        f"mesh {layout}:",
        "",
        *_times_table([("", batch)]),
    ]


def _times_table(batches: list[tuple[str, BatchPlan]]) -> list[str]:
    rows = []
    for name, batch in batches:
        limit = batch.weight_seconds and batch.weight_seconds / batch.images
        row = [
            name,
            f"{max(plan.memory.total for plan in batch.plans) / 2**30:.1f}",
            f"{limit:.2f}" if limit else "-",
        ]
        for bound in BOUNDS:
            seconds = batch.seconds(bound)
            if seconds is None or limit is None:
                row.append("-")
            else:
                row.append(f"{seconds:.2f} ({seconds / limit:.1f} x)")
        rows.append(row)
    return report.table(["", "GiB a device", "reading weights, s an image", *BOUNDS.values()], rows)


def _to_dict(batch: BatchPlan) -> dict[str, Any]:
    return {
        "images": batch.images,
        "calls": batch.calls,
        "memory": [plan.memory.total for plan in batch.plans],
        "weight_seconds_an_image": batch.weight_seconds and batch.weight_seconds / batch.images,
        "seconds_an_image": {bound: batch.seconds(bound) for bound in BOUNDS},
    }


def plan_batch(
    setting: Setting, config: TextToImageConfig, mesh: Mesh, decoder: Plan | None = None
) -> BatchPlan:
    """Compiles the programs of `TextToImage.generate`; the decoder only if its plan is not given.

    Raises:
      UserError: a mesh that does not divide the model, or the batch.
      DoesNotFit: it needs more memory than a device has.
    """
    batch = _Programs(setting, config, mesh)
    begin = make_plan(batch.begin())
    plans = (begin, make_plan(batch.advance(begin)), decoder or make_plan(batch.decode()))
    calls = (1, 1, -(-setting.batch_size // plans[2].program.images))
    read = _bytes_read(batch.weights["model"], batch.patches, batch.solver.num_evaluations)
    return BatchPlan(
        plans, calls, setting.batch_size, read / begin.chip.bandwidth if begin.chip else None
    )


class _Programs:
    """The programs of one batch, with the shapes and shardings of their arguments."""

    def __init__(self, setting: Setting, config: TextToImageConfig, mesh: Mesh) -> None:
        height, width = parse_size(setting.size)
        self._config, self._mesh, self._sampler, self._images = (
            config,
            mesh,
            setting.sampler,
            setting.batch_size,
        )
        self._dtype = jnp.dtype(setting.dtype)
        self._compiled = Programs(config, mesh, self._dtype)
        self._size, self._grid = (height, width), height // config.tokenizer.downsampling
        self._tokens = model.token_positions(config, height, width)
        self.patches = len(self._tokens) // config.tokens_per_step
        self.weights = abstract_weights(config, mesh, self._dtype, setting.weights)
        one = model.prefix_rows(config, [[0] * setting.prompt_tokens], height, width)
        length = one.tokens.shape[1]
        array: Any = self._replicated
        prompts, unconditional = (
            Prefixes(array((rows, length), jnp.int32), array((rows,), jnp.int32))
            for rows in (self._images, 1)
        )
        positions = self._replicated(self._tokens.shape, jnp.int32)
        self._inputs = Inputs(prompts, (unconditional, positions))
        self._keys = self._replicated((self._images, 2), jnp.uint32)
        self.solver, scales = next_patch.resolve(
            self._sampler, config.head.time_shift, self.patches
        )
        self._scales = None if scales is None else self._replicated(scales.shape, scales.dtype)

    def begin(self) -> Program:
        inputs = (self.weights["model"], self._inputs, self._scales)
        return self._program("prompts", self._compiled.sampler.begin, inputs, self._flops(0))

    def advance(self, begin: Plan) -> Program:
        """The program after `begin`, whose plan knows how the arrays of the state are sharded."""
        state = self._compiled.sampler.begin.eval_shape(
            self.weights["model"], self._inputs, self._scales
        )
        places = begin.compiled.output_shardings
        state = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
        )
        inputs = (
            self.weights["model"],
            state,
            self._inputs,
            self._keys,
            self._scales,
            self._replicated((), jnp.int32),
        )
        flops = self._flops(self.patches) - self._flops(0)
        name = f"{self.patches} patches"
        return self._program(
            name,
            self._compiled.sampler.advance,
            inputs,
            flops,
            self.patches,
            {"solver": self.solver},
        )

    def decode(self) -> Program:
        config, images = self._config.tokenizer, min(chunk_size(*self._size), self._images)
        grid = (images, self._grid, len(self._tokens) // self._grid, config.bits)
        codes = self._replicated(grid, jnp.int8)
        inputs = (self.weights["tokenizer"], codes, self._replicated((images, 2), jnp.uint32))

        def decode(params: Any, codes: Any, keys: Any) -> Any:
            return decode_codes(
                Autoencoder(config, self._dtype), params, codes, jax.random.wrap_key_data(keys)
            )

        flops = traced_flops(decode, *inputs)
        return Program("decoder", self._compiled.decode, inputs, self._mesh, images, flops)

    def _program(
        self,
        name: str,
        function: Any,
        inputs: tuple[Any, ...],
        flops: int,
        trips: int | None = None,
        static: dict[str, Any] | None = None,
    ) -> Program:
        return Program(name, function, inputs, self._mesh, self._images, flops, trips, static or {})

    def _replicated(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return _array(self._mesh, shape, dtype)

    def _flops(self, patches: int) -> int:
        """Operations of the prompts and of so many patches."""
        config = self._config
        module = model.TextToImage(config, dtype=self._dtype)

        def sample(params: Any, inputs: Any, keys: Any, scales: Any) -> Any:
            reader = read_prompts(module, params, inputs, scales)
            noise = next_patch.noise_of_images(reader, jax.random.wrap_key_data(keys), self.solver)
            state = next_patch.begin(reader, scales)
            if not patches:
                return state
            return next_patch.advance(
                reader, state, patches, noise=noise, solver=self.solver, scales=scales
            )

        params = model.abstract_params(config, scan=False)
        return traced_flops(sample, params, self._inputs, self._keys, self._scales)


def _array(
    mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec = PartitionSpec()
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def abstract_weights(
    config: TextToImageConfig, mesh: Mesh, dtype: jnp.dtype, weights: str
) -> dict[str, Any]:
    """Shapes and shardings of `TextToImage.params`."""
    shapes = {
        "model": model.abstract_params(config, scan=False),
        "tokenizer": autoencoder.abstract_params(config.tokenizer),
    }
    leaves: dict[tuple[str, ...], Any] = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        how = stored_as(mesh, path, leaf.shape, dtype, weights)
        if how is None:
            continue
        stored = jax.ShapeDtypeStruct(leaf.shape, how.dtype)
        parts = jax.eval_shape(quantize, stored) if how.int8 else stored
        axes = [*how.sharding.spec, *[None] * (leaf.ndim - len(how.sharding.spec))]
        leaves[path] = jax.tree.map(
            lambda part, axes=axes: _array(mesh, part.shape, part.dtype, _spec(part.shape, axes)),
            parts,
        )
    return traverse_util.unflatten_dict(leaves)


def _spec(shape: tuple[int, ...], axes: list[Any]) -> PartitionSpec:
    """The sharding of a kernel, or of its scales, whose first axis has size 1."""
    return PartitionSpec(
        *(None if size == 1 else names for size, names in zip(shape, axes, strict=True))
    )


def _bytes_read(params: Any, patches: int, evaluations: int) -> float:
    """Bytes of weights that a device reads for a batch, see `BatchPlan`, without embeddings."""
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "embed_tokens" in name or "time_embed" in name:
            continue
        times = evaluations if name.startswith("head/") and "cond_embed" not in name else 1
        total += times * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    return patches * total
