"""The programs of text-to-image sampling: prompts, patches and decoder, with shapes for arrays."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bitdance_jax.config import MeshConfig, SamplerConfig, TextToImageConfig
from bitdance_jax.models import prompt_rows
from bitdance_jax.models import text_to_image as model
from bitdance_jax.models.text_to_image import Prefixes
from bitdance_jax.nn import quantize
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.pipelines.checks import parse_size
from bitdance_jax.pipelines.programs import Programs, read_prompts
from bitdance_jax.pipelines.text_to_image import ALL_DEVICES, RELEASED_SAMPLER
from bitdance_jax.pipelines.tokenizer import chunk_size, decode_codes
from bitdance_jax.pipelines.weights import WeightType, stored_as
from bitdance_jax.plan.analysis import Plan
from bitdance_jax.plan.programs import Program
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.compiled import Inputs
from bitdance_jax.tokenizer import autoencoder
from bitdance_jax.tokenizer.autoencoder import Autoencoder


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


class BatchPrograms:
    """The programs of one batch, with the shapes and shardings of their arguments."""

    def __init__(self, setting: Setting, config: TextToImageConfig, mesh: Mesh) -> None:
        height, width = parse_size(setting.size)
        self._config = config
        self._mesh = mesh
        self._images = setting.batch_size
        self._dtype = jnp.dtype(setting.dtype)
        self._compiled = Programs(config, mesh, self._dtype)
        self._size = (height, width)
        self._grid = height // config.tokenizer.downsampling
        self._tokens = model.token_positions(config, height, width)
        self.patches = len(self._tokens) // config.tokens_per_step
        self.weights = abstract_weights(config, mesh, self._dtype, setting.weights)
        one = prompt_rows.prefix_rows(config, [[0] * setting.prompt_tokens], height, width)
        length = one.tokens.shape[1]
        array: Any = self._replicated
        prompts, unconditional = (
            Prefixes(array((rows, length), jnp.int32), array((rows,), jnp.int32))
            for rows in (self._images, self._images)
        )
        positions = self._replicated(self._tokens.shape, jnp.int32)
        self._inputs = Inputs((prompts, unconditional), positions)
        self._keys = self._replicated((self._images, 2), jnp.uint32)
        self.solver, scales = next_patch.resolve(
            setting.sampler, config.head.time_shift, self.patches
        )
        self._scales = None if scales is None else self._replicated(scales.shape, scales.dtype)

    def begin(self) -> Program:
        """Reads the prompts."""
        inputs = (self.weights["model"], self._inputs, self._scales)
        return self._program("prompts", self._compiled.sampler.begin, inputs, self._flops(0))

    def advance(self, begin: Plan) -> Program:
        """Samples all patches. The plan of `begin` has the shardings of the sampler state."""
        state = self._compiled.sampler.begin.eval_shape(
            self.weights["model"], self._inputs, self._scales
        )
        state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            begin.compiled.output_shardings,
        )
        inputs = (
            self.weights["model"],
            state,
            self._inputs,
            self._keys,
            self._scales,
            self._replicated((), jnp.int32),
        )
        return self._program(
            f"{self.patches} patches",
            self._compiled.sampler.advance,
            inputs,
            self._flops(self.patches) - self._flops(0),
            trips=self.patches,
            static={"solver": self.solver},
        )

    def decode(self) -> Program:
        """Decodes as many images as `TextToImage` decodes at a time."""
        config = self._config.tokenizer
        images = min(chunk_size(*self._size), self._images)
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
        **options: Any,
    ) -> Program:
        return Program(name, function, inputs, self._mesh, self._images, flops, **options)

    def bytes_read(self) -> float:
        """Bytes of weights, without embeddings, that a device reads.

        It reads the head's for every evaluation, and the others for every patch.
        """
        total = 0.0
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.weights["model"]):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if "embed_tokens" in name or "time_embed" in name:
                continue
            in_head = name.startswith("head/") and "cond_embed" not in name
            times = self.solver.num_evaluations if in_head else 1
            shard = leaf.sharding.shard_shape(leaf.shape)
            total += times * quantize.num_bytes(jax.ShapeDtypeStruct(shard, leaf.dtype))
        return self.patches * total

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
        stored = jax.ShapeDtypeStruct(leaf.shape, how.dtype, sharding=how.sharding)
        if how.quantization is None:
            leaves[path] = stored
            continue
        leaves[path] = jax.tree.map(
            lambda part, sharding: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding),
            quantize.abstract(stored, how.quantization, "/".join(path)),
            how.parts,
        )
    return traverse_util.unflatten_dict(leaves)
