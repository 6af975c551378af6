"""EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946, in the variant without squeeze and
excitation): a small network whose ImageNet features serve as a perceptual distance."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


Params = Mapping[str, Any]

CLASSES = 1000
STEM_WIDTH = 32
HEAD_WIDTH = 1280
EPSILON = 1e-10


class Stage(NamedTuple):
    """Inverted residual blocks: 1x1 expansion, depthwise convolution, 1x1 projection.

    Attributes:
      blocks: how many.
      kernel: side of the depthwise convolution.
      stride: of the first block's; the others have 1.
      expansion: channels inside a block for each of its inputs.
      width: output channels.
    """

    blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)

FEATURE_STAGES = (0, 1, 2, 4, 6)
"""Stages whose outputs are compared: the last ones at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image."""


class Block(NamedTuple):
    """Sizes of one block.

    Attributes:
      stage: index in `STAGES`.
      kernel, stride: of the depthwise convolution.
      expand: whether there is a 1x1 expansion.
      inputs, hidden, outputs: channels.
    """

    stage: int
    kernel: int
    stride: int
    expand: bool
    inputs: int
    hidden: int
    outputs: int


def blocks() -> list[Block]:
    """All blocks in order."""
    result = []
    inputs = STEM_WIDTH
    for index, stage in enumerate(STAGES):
        for number in range(stage.blocks):
            stride = 1 if number else stage.stride
            hidden = inputs * stage.expansion
            expand = stage.expansion > 1
            result.append(Block(index, stage.kernel, stride, expand, inputs, hidden, stage.width))
            inputs = stage.width
    return result


def abstract_params() -> dict[str, Any]:
    """Shapes of the parameters, float32: convolutions with their batch norms folded in.

    `stem`, `block_i` with `expand` (where there is one), `depthwise` and `project`, `head`, and
    `classifier`; each has `kernel` [h, w, C, D] (the classifier: [C, D]) and `bias` [D].
    """

    def layer(*kernel: int) -> dict[str, Any]:
        return {
            "kernel": jax.ShapeDtypeStruct(kernel, jnp.float32),
            "bias": jax.ShapeDtypeStruct(kernel[-1:], jnp.float32),
        }

    params: dict[str, Any] = {"stem": layer(3, 3, 3, STEM_WIDTH)}
    for number, block in enumerate(blocks()):
        layers = {"expand": layer(1, 1, block.inputs, block.hidden)} if block.expand else {}
        layers["depthwise"] = layer(block.kernel, block.kernel, 1, block.hidden)
        layers["project"] = layer(1, 1, block.hidden, block.outputs)
        params[f"block_{number}"] = layers
    params["head"] = layer(1, 1, STAGES[-1].width, HEAD_WIDTH)
    params["classifier"] = layer(HEAD_WIDTH, CLASSES)
    return params


def stage_features(
    params: Params, images: Float[Array, "B H W 3"]
) -> tuple[Float[Array, "B _ _ _"], ...]:
    """Outputs of all stages, of images in [-1, 1]."""
    x = (127.5 * images + 127.5 - 127) / 128
    x = jax.nn.relu6(_conv(x, params["stem"], stride=2))
    outputs = []
    sizes = blocks()
    for number, block in enumerate(sizes):
        x = _inverted_residual(x, params[f"block_{number}"], block)
        if number + 1 == len(sizes) or sizes[number + 1].stage != block.stage:
            outputs.append(x)
    return tuple(outputs)


def pooled_features(params: Params, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
    """The 1,280 features below the classifier, averaged over space."""
    x = stage_features(params, images)[-1]
    return jnp.mean(jax.nn.relu6(_conv(x, params["head"])), axis=(1, 2))


def logits(params: Params, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
    """Of ImageNet's 1,000 classes."""
    layer = params["classifier"]
    return pooled_features(params, images) @ layer["kernel"] + layer["bias"]


def distance(
    params: Params, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]
) -> Float[Array, "B"]:
    """Perceptual distance of each pair of images in [-1, 1], 0 to 4; 0 for equal ones.

    As LPIPS without learnt weights: squared distance of features of unit length, averaged over
    positions and stages.
    """
    features = stage_features(params, jnp.concatenate([a, b]))
    total = jnp.zeros(len(a))
    for stage in FEATURE_STAGES:
        x = features[stage]
        squared_norm = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        unit = x * jax.lax.rsqrt(squared_norm + EPSILON)
        squared = jnp.sum(jnp.square(unit[: len(a)] - unit[len(a) :]), axis=-1)
        total += jnp.mean(squared, axis=(1, 2))
    return total / len(FEATURE_STAGES)


def _inverted_residual(
    x: Float[Array, "B H W C"], params: Params, block: Block
) -> Float[Array, "B H2 W2 D"]:
    y = jax.nn.relu6(_conv(x, params["expand"])) if block.expand else x
    y = jax.nn.relu6(_depthwise(y, params["depthwise"], block.stride))
    y = _conv(y, params["project"])
    return x + y if block.stride == 1 and block.inputs == block.outputs else y


def _conv(
    x: Float[Array, "B H W C"], params: Params, *, stride: int = 1
) -> Float[Array, "B H2 W2 D"]:
    """Convolution with TensorFlow's "same" padding."""
    y = jax.lax.conv_general_dilated(
        x,
        params["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + params["bias"]


def _depthwise(
    x: Float[Array, "B H W C"], params: Params, stride: int
) -> Float[Array, "B H2 W2 C"]:
    """Convolution of each channel by itself, with TensorFlow's "same" padding.

    A sum of shifted images: on CPUs, XLA's grouped convolution takes 7 times as long.
    """
    kernel = params["kernel"]
    side = len(kernel)
    padding = jax.lax.padtype_to_pads(x.shape[1:3], (side, side), (stride, stride), "SAME")
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, height, width, channels = x.shape
    last_row = height - side
    last_column = width - side
    y = params["bias"]
    for row in range(side):
        for column in range(side):
            end = (batch, row + last_row + 1, column + last_column + 1, channels)
            shifted = jax.lax.slice(x, (0, row, column, 0), end, (1, stride, stride, 1))
            y = y + kernel[row, column, 0] * shifted
    return y
