"""LPIPS: distance between images in VGG16's features (Zhang et al. 2018, arXiv 1801.03924)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


Params = Mapping[str, Any]

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions. The last activations of each stage are the features; stages are
separated by max pooling."""

MEAN = (-0.030, -0.088, -0.188)
DEVIATION = (0.458, 0.448, 0.450)
"""Of ImageNet's images on the scale [-1, 1], per channel; LPIPS' own values."""

EPSILON = 1e-10
SMALLEST_SIDE = 16
"""Pixels: VGG16 halves an image four times before its last stage."""


def abstract_params() -> dict[str, Any]:
    """Shapes of the parameters, float32.

    `conv_i` with `kernel` [3, 3, C, D] and `bias` [D]: VGG16's thirteen convolutions in order.
    `linear_i` [D]: non-negative weights of a stage's channels.
    """
    params: dict[str, Any] = {}
    inputs = 3
    for stage, widths in enumerate(STAGES):
        for width in widths:
            params[f"conv_{sum(name.startswith('conv') for name in params)}"] = {
                "kernel": jax.ShapeDtypeStruct((3, 3, inputs, width), jnp.float32),
                "bias": jax.ShapeDtypeStruct((width,), jnp.float32),
            }
            inputs = width
        params[f"linear_{stage}"] = jax.ShapeDtypeStruct((widths[-1],), jnp.float32)
    return params


def lpips(
    params: Params, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]
) -> Float[Array, "B"]:
    """Distance of each pair of images, at least 0; 0 for equal ones.

    Args:
      params: as `abstract_params`.
      a, b: in [-1, 1], sides of at least `SMALLEST_SIDE` pixels.
    """
    # One pass over both, so that the kernels are read once.
    features = vgg16_features(params, jnp.concatenate([a, b]))
    distance = jnp.zeros(len(a))
    for stage, both in enumerate(features):
        # The maximum keeps the gradient finite where all features of a position are 0.
        squared_norm = jnp.sum(jnp.square(both), axis=-1, keepdims=True)
        unit = both / (jnp.sqrt(jnp.maximum(squared_norm, EPSILON**2)) + EPSILON)
        squared = jnp.square(unit[: len(a)] - unit[len(a) :])
        distance += jnp.mean(squared @ params[f"linear_{stage}"], axis=(1, 2))
    return distance


def vgg16_features(
    params: Params, images: Float[Array, "B H W 3"]
) -> tuple[Float[Array, "B _ _ _"], ...]:
    """Activations after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""
    x = (images - jnp.array(MEAN)) / jnp.array(DEVIATION)
    features = []
    layer = 0
    for stage, widths in enumerate(STAGES):
        if stage:
            x = _max_pool(x)
        for _ in widths:
            x = jax.nn.relu(_conv3x3(x, params[f"conv_{layer}"]))
            layer += 1
        features.append(x)
    return tuple(features)


def _conv3x3(x: Float[Array, "B H W C"], params: Params) -> Float[Array, "B H W D"]:
    y = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + params["bias"]


def _max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Largest of each 2 x 2 pixels; an odd last row or column is dropped."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
