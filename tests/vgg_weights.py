"""LPIPS as recorded: VGG16's weights from a seed (golden/README), the linear layers published."""

import functools
from typing import Any

import golden_models
import numpy as np

from bitdance_jax.tokenizer import perceptual


@functools.cache
def lpips_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    params: dict[str, Any] = {}
    inputs = 3
    for layer, width in enumerate(width for stage in perceptual.STAGES for width in stage):
        kernel = rng.standard_normal((width, inputs, 3, 3)) * np.sqrt(2 / (9 * inputs))
        bias = 0.1 * rng.standard_normal(width)
        params[f"conv_{layer}"] = {
            "kernel": kernel.transpose(2, 3, 1, 0).astype(np.float32),
            "bias": bias.astype(np.float32),
        }
        inputs = width
    recorded = golden_models.read("perceptual/lpips")
    for stage in range(len(perceptual.STAGES)):
        params[f"linear_{stage}"] = recorded[f"lpips.lin{stage}.model.1.weight"][0, :, 0, 0]
    return params
