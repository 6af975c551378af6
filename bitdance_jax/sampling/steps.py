"""Class-conditional codes while they are drawn, some patches at a time, by two compiled programs."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from bitdance_jax.config import SamplerConfig
from bitdance_jax.flow_head.solver import num_noises
from bitdance_jax.models import class_conditional
from bitdance_jax.models.class_conditional import ClassConditional
from bitdance_jax.sampling.next_patch import Drawing, NoiseSource, noise_from_keys


def draw_steps(
    model: ClassConditional, params: Any, labels: Int[np.ndarray, "B"], keys: Array, sampler: SamplerConfig, every: int
) -> Iterator[Drawing]:
    """A batch when 1, 1 + every, ... and all of its patches are drawn. Each takes the last one's memory."""
    drawing = _begin(model, params, labels, keys, sampler)
    yield drawing
    for drawn in range(1, model.config.num_steps, every):
        drawing = _advance(model, params, drawing, keys, sampler, np.int32(min(drawn + every, model.config.num_steps)))
        yield drawing


@functools.partial(jax.jit, static_argnames=("model", "sampler"))
def _begin(model: ClassConditional, params: Any, labels: Int[Array, "B"], keys: Array, sampler: SamplerConfig) -> Drawing:
    return class_conditional.begin(model, params, labels, _noise(model, keys, sampler), sampler)


@functools.partial(jax.jit, static_argnames=("model", "sampler"), donate_argnames="drawing")
def _advance(model: ClassConditional, params: Any, drawing: Drawing, keys: Array, sampler: SamplerConfig, stop: Int[Array, ""]) -> Drawing:
    return class_conditional.advance(model, params, drawing, _noise(model, keys, sampler), sampler, stop)


def _noise(model: ClassConditional, keys: Array, sampler: SamplerConfig) -> NoiseSource:
    return noise_from_keys(keys, num_noises(sampler), model.config.tokens_per_step, model.config.tokenizer.bits)
