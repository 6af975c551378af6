"""Class-conditional pictures, seen while they are drawn. `TextToImage.generate_steps` is the same for prompts."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Int8, UInt8

from bitdance_jax.config import SamplerConfig
from bitdance_jax.errors import UserError
from bitdance_jax.flow_head.solver import num_noises
from bitdance_jax.models import class_conditional
from bitdance_jax.models.class_conditional import ClassConditional
from bitdance_jax.sampling.next_patch import Drawing, NoiseSource, noise_from_keys
from bitdance_jax.sampling.pipeline import ClassConditionalPipeline, image_keys
from bitdance_jax.sampling.text_to_image import Partial
from bitdance_jax.transformer import order


def sample_steps(
    pipeline: ClassConditionalPipeline,
    labels: Sequence[int | str],
    seed: int = 0,
    *,
    every: int,
    sampler: SamplerConfig | None = None,
    first_index: int = 0,
) -> Iterator[Partial]:
    """`pipeline.sample` of one batch, seen while it is drawn: after the first patch, after every `every` more, and at the end.

    The last pictures are those that `pipeline.sample` gives, up to rounding.

    Raises:
      UserError: as `pipeline.sample`; `every` is not positive; no labels.
    """
    if every < 1:
        raise UserError(f"every must be positive, got {every}")
    if not labels:
        raise UserError("there are no labels to draw")
    sampler, steps = sampler or pipeline.sampler, pipeline.config.num_steps
    model, params = ClassConditional(pipeline.config, dtype=pipeline.dtype), pipeline.params["model"]
    numbers = np.array([pipeline.label(label) for label in labels], np.int32)
    keys = image_keys(seed, first_index, len(numbers))
    drawing = _begin(model, params, numbers, keys, sampler)
    yield Partial(1, steps, _pictures(pipeline, np.asarray(drawing.codes), 1, seed, first_index))
    for drawn in range(1, steps, every):
        stop = min(drawn + every, steps)
        drawing = _advance(model, params, drawing, keys, sampler, np.int32(stop))
        yield Partial(stop, steps, _pictures(pipeline, np.asarray(drawing.codes), stop, seed, first_index))


@functools.partial(jax.jit, static_argnames=("model", "sampler"))
def _begin(model: ClassConditional, params: Any, labels: Int[Array, "B"], keys: Array, sampler: SamplerConfig) -> Drawing:
    return class_conditional.begin(model, params, labels, _noise(model, keys, sampler), sampler)


@functools.partial(jax.jit, static_argnames=("model", "sampler"), donate_argnames="drawing")
def _advance(model: ClassConditional, params: Any, drawing: Drawing, keys: Array, sampler: SamplerConfig, stop: Int[Array, ""]) -> Drawing:
    return class_conditional.advance(model, params, drawing, _noise(model, keys, sampler), sampler, stop)


def _noise(model: ClassConditional, keys: Array, sampler: SamplerConfig) -> NoiseSource:
    return noise_from_keys(keys, num_noises(sampler), model.config.tokens_per_step, model.config.tokenizer.bits)


def _pictures(
    pipeline: ClassConditionalPipeline, codes: Int8[np.ndarray, "N B P K"], drawn: int, seed: int, first_index: int
) -> UInt8[np.ndarray, "B H W 3"]:
    """Where nothing is drawn, the decoder gets what is, over and over, and grey takes its place."""
    patches = np.arange(len(codes))
    pictures = pipeline.tokenizer.decode(_grid(pipeline, codes[patches % drawn]).astype(np.int8), seed, first_index)
    done = np.broadcast_to((patches < drawn)[:, None, None, None], codes[:, :1, :, :1].shape)
    side = pipeline.config.tokenizer.downsampling
    mask = _grid(pipeline, done).astype(bool).repeat(side, 1).repeat(side, 2)
    return np.where(mask, pictures, np.uint8(128))


def _grid(pipeline: ClassConditionalPipeline, patches: np.ndarray) -> Float[np.ndarray, "B h w K"]:
    config = pipeline.config
    tokens = jnp.asarray(rearrange(patches, "n b p k -> b (n p) k"), jnp.float32)
    return np.asarray(order.sequence_to_grid(tokens, config.grid, config.patch_side, config.order))
