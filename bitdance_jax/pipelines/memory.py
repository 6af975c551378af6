"""An estimate of whether a text-to-image model fits the devices, and of what would fit."""

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
from bitdance_jax.nn.quantize import QUANTIZED
from bitdance_jax.perf.hardware import device_memory
from bitdance_jax.pipelines.tokenizer import chunk_size
from bitdance_jax.sampling.guidance import rows_of_image
from bitdance_jax.sampling.solvers import make_solver
from bitdance_jax.tokenizer import autoencoder, strips


WHOLE = 3
"""Images of `ch` channels in float32 that the decoder holds at once, as compilers plan it."""

IN_STRIPS = 2.25
"""The same for a decoder in strips, in the compute type: two, and gaps that XLA for TPUs leaves."""

IN_STRIPS_SHARDED = 3
"""The same where rows are sharded: XLA for TPUs then transposes an image to send its edges."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What decides how much memory sampling takes.

    Attributes:
      config: sizes.
      weights: the type that they are stored in, or "int8".
      dtype: compute type.
      mesh: sizes of the axes: data, fsdp, tensor.
      size: height and width in pixels.
      images: at a time.
      sampler: its guidance and steps.
    """

    config: TextToImageConfig
    weights: str
    dtype: str
    mesh: tuple[int, ...]
    size: tuple[int, int]
    images: int
    sampler: SamplerConfig


def check(setting: Setting, device: Any) -> None:
    """Raises a ResourceError that says what would fit if a jax.Device has less than `needed`."""
    available = device_memory(device)
    if available is None or sum(needed(setting)) <= available:
        return
    weights, patches, decoder = map(_gib, needed(setting))
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
        f"{_gib(sum(needed(setting)))} a device are needed "
        f"(weights {weights}, sampling {patches}, decoder {decoder}), and "
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
    """Bytes on each device: weights; cache, attention and head of the sampler; decoder."""
    config, mesh, bytes_each = (
        setting.config,
        AbstractMesh(setting.mesh, AXES),
        jnp.dtype(setting.dtype).itemsize,
    )
    text, (height, width), tensor = config.text, setting.size, setting.mesh[-1]
    slots = model.PREFIX_LENGTHS[0] + height * width // config.tokenizer.downsampling**2
    cache = 2 * text.num_layers * text.num_kv_heads * text.head_dim * slots * bytes_each
    scores = 2 * 4 * text.num_heads * config.tokens_per_step * slots
    rows = setting.images * rows_of_image(setting.sampler)
    parts = math.gcd(batch_parts(mesh), rows)
    held = rows * (cache + scores) / (parts * math.gcd(tensor, text.num_kv_heads)) + _head(
        setting, rows
    ) / (parts * tensor)
    return _weights(setting, mesh), held, _activations(setting, mesh) if height * width else 0.0


def _head(setting: Setting, rows: int) -> float:
    """What the head holds while it samples a patch."""
    config = setting.config
    solver = make_solver(setting.sampler, config.head.time_shift)
    head = make_head(
        config.head,
        bits=config.tokenizer.bits,
        tokens_per_step=config.tokens_per_step,
        dtype=setting.dtype,
    )
    return head.sampling_bytes(rows, solver.num_evaluations)


def _activations(setting: Setting, mesh: AbstractMesh) -> float:
    tokenizer, (height, width) = setting.config.tokenizer, setting.size
    count = min(chunk_size(height, width), setting.images)
    tokens = (
        count,
        height // tokenizer.downsampling,
        width // tokenizer.downsampling,
        tokenizer.bits,
    )
    cut = mesh.size > 1 and tokens[1] % mesh.size == 0
    values = count * height * width * tokenizer.ch / (mesh.size if cut else 1)
    if strips.choose(tokens, tokenizer.downsampling, AXES if cut else ()) is None:
        return WHOLE * 4 * values
    # A strip is there as it is read, normalized, padded, and as it comes out of the convolution.
    return (IN_STRIPS_SHARDED if cut else IN_STRIPS) * jnp.dtype(
        setting.dtype
    ).itemsize * values + 4 * min(strips.STRIP_BYTES, 4 * values)


def _weights(setting: Setting, mesh: AbstractMesh) -> float:
    kept = jnp.dtype(setting.dtype if setting.weights == "int8" else setting.weights).itemsize
    shapes, decoder = _shapes(setting.config)
    total = float(kept * decoder)
    for name, shape in shapes.items():
        parts = math.prod(
            num_parts(mesh, axes) for axes in sharding.parameter_spec(mesh, name, shape)
        )
        total += (
            math.prod(shape)
            / parts
            * (1 if setting.weights == "int8" and QUANTIZED.search(name) else kept)
        )
    return total


@functools.cache
def _shapes(config: TextToImageConfig) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of the weights that sampling reads, and the size of the replicated decoder."""
    decoder = jax.tree.leaves(autoencoder.abstract_params(config.tokenizer)["decoder"])
    leaves = traverse_util.flatten_dict(model.abstract_params(config), sep="/")
    shapes = {
        name: leaf.shape for name, leaf in leaves.items() if not name.startswith("text/lm_head")
    }
    return shapes, sum(leaf.size for leaf in decoder)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
