"""Estimates the memory of text-to-image sampling, before anything is read or compiled."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import AbstractMesh

from bitdance_jax.config import SamplerConfig, TextToImageConfig
from bitdance_jax.distributed import sharding
from bitdance_jax.distributed.mesh import AXES, batch_parts, num_parts
from bitdance_jax.errors import ResourceError
from bitdance_jax.heads.make import make_head
from bitdance_jax.models import text_to_image as model
from bitdance_jax.nn import quantize
from bitdance_jax.perf.hardware import device_memory
from bitdance_jax.pipelines.tokenizer import chunk_size
from bitdance_jax.sampling.guidance import rows_of_image
from bitdance_jax.sampling.solvers import make_solver
from bitdance_jax.tokenizer import autoencoder, strips


UNSTRIPPED = 3
"""Images of `ch` channels in float32 that the decoder holds at once, as compilers plan it."""

IN_STRIPS = 2.25
"""The same for decoding in strips, in the compute type: two, and gaps of the compiler for TPUs."""

IN_SHARDED_STRIPS = 3
"""The same where images are sharded by rows: that compiler transposes one to send its edges."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What determines the memory of sampling.

    Attributes:
      config: of the model.
      weights: storage type of the weights (`weights.WeightType`).
      dtype: compute type.
      mesh: sizes of the axes: data, fsdp, tensor.
      size: height and width in pixels.
      images: number of images that are sampled at a time.
      sampler: determines guidance and solver.
    """

    config: TextToImageConfig
    weights: str
    dtype: str
    mesh: tuple[int, ...]
    size: tuple[int, int]
    images: int
    sampler: SamplerConfig


def check(setting: Setting, device: Any) -> None:
    """Checks that a setting fits the memory of its devices.

    Args:
      setting: the setting.
      device: a jax.Device of the mesh.

    Raises:
      ResourceError: it does not fit; the message names settings that do.
    """
    available = device_memory(device)
    if available is None or sum(needed(setting)) <= available:
        return
    weights, sampling, decoder = map(_gib, needed(setting))
    fit = [
        f"{name} ({_gib(sum(needed(other)))})"
        for name, other in _others(setting)
        if sum(needed(other)) <= available
    ]
    hint = (
        f"what fits: {', or '.join(fit[:3])}"
        if fit
        else "use more or larger devices, and shard the model over them with mesh.tensor"
    )
    raise ResourceError(
        f"{_gib(sum(needed(setting)))} a device are needed (weights {weights},"
        f" sampling {sampling}, decoder {decoder}), and "
        f"{device.device_kind} has {_gib(available)}; {hint}"
    )


def _others(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Settings that need less, in the order in which to try them."""
    height, width = setting.size
    small = dataclasses.replace(setting, weights="int8")
    yield "weights='int8'", small
    if setting.images > 1:
        yield "batch_size=1", dataclasses.replace(setting, images=1)
        yield "weights='int8' and batch_size=1", dataclasses.replace(small, images=1)
    smallest = dataclasses.replace(setting, weights="int4")
    yield "weights='int4'", smallest
    if setting.images > 1:
        yield "weights='int4' and batch_size=1", dataclasses.replace(smallest, images=1)
    for devices in (2, 4, 8):
        if devices > math.prod(setting.mesh):
            yield (
                f"mesh.tensor={devices} on {devices} such devices",
                dataclasses.replace(setting, mesh=(1, 1, devices)),
            )
    if height and width:
        yield (
            f"images of {width // 2}x{height // 2}",
            dataclasses.replace(setting, size=(height // 2, width // 2)),
        )


def needed(setting: Setting) -> tuple[float, float, float]:
    """Bytes on each device.

    Returns:
      weights; KV cache, attention and head while patches are sampled; activations of the decoder.
    """
    config = setting.config
    mesh = AbstractMesh(setting.mesh, AXES)
    item_bytes = jnp.dtype(setting.dtype).itemsize
    text = config.text
    height, width = setting.size
    tensor = setting.mesh[-1]
    slots = model.PREFIX_LENGTHS[0] + height * width // config.tokenizer.downsampling**2
    cache = 2 * text.num_layers * text.num_kv_heads * text.head_dim * slots * item_bytes
    scores = 2 * 4 * text.num_heads * config.tokens_per_step * slots
    rows = setting.images * rows_of_image(setting.sampler)
    parts = math.gcd(batch_parts(mesh), rows)
    sampling = rows * (cache + scores) / (parts * math.gcd(tensor, text.num_kv_heads))
    sampling += _head(setting, rows) / (parts * tensor)
    decoder = _activations(setting, mesh) if height * width else 0.0
    return _weights(setting, mesh), sampling, decoder


def _head(setting: Setting, rows: int) -> float:
    """Bytes of the head while it samples a patch."""
    config = setting.config
    solver = make_solver(setting.sampler, config.head.time_shift)
    head = make_head(
        config.head,
        bits=config.tokenizer.bits,
        tokens_per_step=config.tokens_per_step,
        dtype=setting.dtype,
    )
    # With int4 weights the modulation is computed at each evaluation (`FlowHead.prepare_patch`).
    evaluations = 1 if setting.weights == "int4" else solver.num_evaluations
    return head.sampling_bytes(rows, evaluations)


def _activations(setting: Setting, mesh: AbstractMesh) -> float:
    tokenizer = setting.config.tokenizer
    height, width = setting.size
    count = min(chunk_size(height, width), setting.images)
    tokens = (
        count,
        height // tokenizer.downsampling,
        width // tokenizer.downsampling,
        tokenizer.bits,
    )
    sharded = mesh.size > 1 and tokens[1] % mesh.size == 0
    values = count * height * width * tokenizer.ch / (mesh.size if sharded else 1)
    if strips.choose(tokens, tokenizer.downsampling, AXES if sharded else ()) is None:
        return UNSTRIPPED * 4 * values
    num_images = IN_SHARDED_STRIPS if sharded else IN_STRIPS
    image_bytes = num_images * jnp.dtype(setting.dtype).itemsize * values
    # Four copies of a strip: as read, normalized, padded, and after the convolution.
    return image_bytes + 4 * min(strips.STRIP_BYTES, 4 * values)


def _weights(setting: Setting, mesh: AbstractMesh) -> float:
    quantized = setting.weights in quantize.FORMATS
    dtype = jnp.dtype(setting.dtype if quantized else setting.weights)
    shapes, decoder = _shapes(setting.config)
    total = float(dtype.itemsize * decoder)
    for name, shape in shapes.items():
        weight = jax.ShapeDtypeStruct(shape, dtype)
        for part in jax.tree.leaves(_stored(weight, name, setting.weights)):
            spec = sharding.part_spec(mesh, name, shape, part.shape)
            parts = math.prod(num_parts(mesh, axes) for axes in spec)
            total += quantize.num_bytes(part) / parts
    return total


@functools.cache
def _stored(weight: jax.ShapeDtypeStruct, name: str, weights: str) -> Any:
    how = quantize.chosen(name, weights)
    return weight if how is None else quantize.abstract(weight, how, name)


@functools.cache
def _shapes(config: TextToImageConfig) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of all parameters that sampling reads, and the size of the decoder.

    The decoder is not in the shapes: it is replicated.
    """
    decoder = jax.tree.leaves(autoencoder.abstract_params(config.tokenizer)["decoder"])
    leaves = traverse_util.flatten_dict(model.abstract_params(config), sep="/")
    shapes = {
        name: leaf.shape for name, leaf in leaves.items() if not name.startswith("text/lm_head")
    }
    return shapes, sum(leaf.size for leaf in decoder)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
