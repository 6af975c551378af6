"""Inception-v3 in its FID variant: the TensorFlow graph of 2015, with which FIDs are published.

It differs from the usual Inception-v3: average pooling does not count the padding, the last block
pools by the maximum, and there are 1,008 classes. Submodules have the names of the published
PyTorch port, so that the keys of its state dict are the paths of the parameters here.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float, UInt8

from bitdance_jax.fid.resize import resize_bilinear


INPUT_SIZE = 299
POOLED, SPATIAL_CHANNELS, CLASSES = 2048, 7, 1008
SPATIAL = 17 * 17 * SPATIAL_CHANNELS


class Features(NamedTuple):
    """The features of a batch of images.

    Attributes:
      pooled: for FID, precision and recall.
      spatial: for sFID; None if the network has none.
      logits: of a classifier, for the Inception Score; None if the network has none.
    """

    pooled: Float[Array | np.ndarray, "B D"]
    spatial: Float[Array | np.ndarray, "B positions"] | None = None
    logits: Float[Array | np.ndarray, "B classes"] | None = None


class InceptionV3(nn.Module):
    """The features of ADM's suite, in float32, of images of any size.

    The spatial features are the first 7 channels of the first convolution of mixed_6 at all 17 x 17
    positions, flattened in the order row, column, channel. The logits are without the classifier's
    bias.
    """

    @nn.compact
    def __call__(self, images: UInt8[Array | np.ndarray, "B H W 3"]) -> Features:
        x = (resize_bilinear(images, (INPUT_SIZE, INPUT_SIZE)) - 128) / 128
        x = ConvNormRelu(32, (3, 3), stride=2, padding="VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNormRelu(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = ConvNormRelu(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = ConvNormRelu(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = ConvNormRelu(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = BlockA(32, name="Mixed_5b")(x)
        x = BlockA(64, name="Mixed_5c")(x)
        x = BlockA(64, name="Mixed_5d")(x)
        x = BlockB(name="Mixed_6a")(x)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        # The 1x1 branch comes first in Mixed_6d, which the TensorFlow graph calls mixed_6.
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(pool="average", name="Mixed_7b")(x)
        x = BlockE(pool="max", name="Mixed_7c")(x)
        pooled = jnp.mean(x, axis=(1, 2))
        logits = nn.Dense(CLASSES, use_bias=False, precision=Precision.HIGHEST, name="fc")(pooled)
        return Features(pooled, spatial, logits)


def features(params: dict[str, Any], images: UInt8[Array | np.ndarray, "B H W 3"]) -> Features:
    """`InceptionV3` as a function, for an `Extractor`; `params` from `inception_weights.load`."""
    outputs: Any = InceptionV3().apply({"params": params}, images)
    return outputs


def abstract_params() -> dict[str, Any]:
    """Shapes of the parameters, float32, without computing any."""
    image = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]


class ConvNormRelu(nn.Module):
    """Convolution, folded batch norm (`inception_weights.convert`), ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        strides = (self.stride, self.stride)
        return nn.relu(
            nn.Conv(
                self.features,
                self.kernel,
                strides,
                self.padding,
                precision=Precision.HIGHEST,
                name="conv",
            )(x)
        )


class BlockA(nn.Module):
    """The 35 x 35 blocks."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        one = ConvNormRelu(64, (1, 1), name="branch1x1")(x)
        five = ConvNormRelu(48, (1, 1), name="branch5x5_1")(x)
        five = ConvNormRelu(64, (5, 5), name="branch5x5_2")(five)
        three = ConvNormRelu(64, (1, 1), name="branch3x3dbl_1")(x)
        three = ConvNormRelu(96, (3, 3), name="branch3x3dbl_2")(three)
        three = ConvNormRelu(96, (3, 3), name="branch3x3dbl_3")(three)
        pool = ConvNormRelu(self.pool_features, (1, 1), name="branch_pool")(_average_pool(x))
        return jnp.concatenate([one, five, three, pool], axis=-1)


class BlockB(nn.Module):
    """From 35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        three = ConvNormRelu(384, (3, 3), stride=2, padding="VALID", name="branch3x3")(x)
        double = ConvNormRelu(64, (1, 1), name="branch3x3dbl_1")(x)
        double = ConvNormRelu(96, (3, 3), name="branch3x3dbl_2")(double)
        double = ConvNormRelu(96, (3, 3), stride=2, padding="VALID", name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockC(nn.Module):
    """The 17 x 17 blocks; `width` channels between the factors of the 7 x 7 convolutions."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W 768"]:
        one = ConvNormRelu(192, (1, 1), name="branch1x1")(x)
        seven = ConvNormRelu(self.width, (1, 1), name="branch7x7_1")(x)
        seven = ConvNormRelu(self.width, (1, 7), name="branch7x7_2")(seven)
        seven = ConvNormRelu(192, (7, 1), name="branch7x7_3")(seven)
        double = ConvNormRelu(self.width, (1, 1), name="branch7x7dbl_1")(x)
        double = ConvNormRelu(self.width, (7, 1), name="branch7x7dbl_2")(double)
        double = ConvNormRelu(self.width, (1, 7), name="branch7x7dbl_3")(double)
        double = ConvNormRelu(self.width, (7, 1), name="branch7x7dbl_4")(double)
        double = ConvNormRelu(192, (1, 7), name="branch7x7dbl_5")(double)
        pool = ConvNormRelu(192, (1, 1), name="branch_pool")(_average_pool(x))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class BlockD(nn.Module):
    """From 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        three = ConvNormRelu(192, (1, 1), name="branch3x3_1")(x)
        three = ConvNormRelu(320, (3, 3), stride=2, padding="VALID", name="branch3x3_2")(three)
        seven = ConvNormRelu(192, (1, 1), name="branch7x7x3_1")(x)
        seven = ConvNormRelu(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = ConvNormRelu(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = ConvNormRelu(192, (3, 3), stride=2, padding="VALID", name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockE(nn.Module):
    """The 8 x 8 blocks, which pool by the average in the first and by the maximum in the second."""

    pool: Literal["average", "max"]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W 2048"]:
        one = ConvNormRelu(320, (1, 1), name="branch1x1")(x)
        three = ConvNormRelu(384, (1, 1), name="branch3x3_1")(x)
        three_row = ConvNormRelu(384, (1, 3), name="branch3x3_2a")(three)
        three_column = ConvNormRelu(384, (3, 1), name="branch3x3_2b")(three)
        double = ConvNormRelu(448, (1, 1), name="branch3x3dbl_1")(x)
        double = ConvNormRelu(384, (3, 3), name="branch3x3dbl_2")(double)
        double_row = ConvNormRelu(384, (1, 3), name="branch3x3dbl_3a")(double)
        double_column = ConvNormRelu(384, (3, 1), name="branch3x3dbl_3b")(double)
        pool = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.pool == "max" else _average_pool(x)
        pool = ConvNormRelu(192, (1, 1), name="branch_pool")(pool)
        return jnp.concatenate(
            [one, three_row, three_column, double_row, double_column, pool], axis=-1
        )


def _average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
