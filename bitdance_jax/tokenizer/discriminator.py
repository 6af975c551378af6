"""The PatchGAN discriminator of tokenizer training (Isola et al. 2017, arXiv 1611.07004)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.nn import linear


MOMENTUM = 0.9
"""Decay of BatchNorm's running statistics, which are stored but not used: training normalizes by
the statistics of the batch."""


def smallest_side(layers: int) -> int:
    """Pixels of the smallest image that a discriminator gives a logit."""
    # `layers` convolutions halve the image; each of the two that follow needs one pixel more.
    return 3 * 2**layers


class PatchDiscriminator(nn.Module):
    """Logits of patches of 70 x 70 pixels (with three layers): positive for real ones.

    Statistics of BatchNorm are those of the batch that one call sees, over all devices. Calls with
    `mutable=["batch_stats"]` update the running ones.

    Attributes:
      filters: channels of the first convolution; each layer doubles them, up to eight times.
      layers: strided convolutions.
      dtype: compute type; logits are float32.
    """

    filters: int = 64
    layers: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w"]:
        x = nn.leaky_relu(self._conv(self.filters, stride=2, bias=True, name="conv_0")(images), 0.2)
        for layer in range(1, self.layers + 1):
            stride = 1 if layer == self.layers else 2
            width = self.filters * min(2**layer, 8)
            x = self._conv(width, stride=stride, bias=False, name=f"conv_{layer}")(x)
            x = nn.leaky_relu(BatchNorm(name=f"norm_{layer}")(x), 0.2).astype(self.dtype)
        logits = self._conv(1, stride=1, bias=True, name=f"conv_{self.layers + 1}")(x)
        return logits[..., 0].astype(jnp.float32)

    def _conv(self, features: int, *, stride: int, bias: bool, name: str) -> linear.Conv:
        return linear.Conv(
            features,
            (4, 4),
            strides=(stride, stride),
            padding=1,
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            name=name,
        )


class BatchNorm(nn.Module):
    """Normalization by the mean and variance of the batch, in float32.

    Not Flax's: its running variance is biased, where released files have the unbiased one.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1:]
        scale = self.param("scale", _ones_and_noise, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_variance = self.variable("batch_stats", "var", jnp.ones, channels)
        x = x.astype(jnp.float32)
        mean = jnp.mean(x, axis=(0, 1, 2))
        variance = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            count = x.size // x.shape[-1]
            unbiased = variance * (count / max(1, count - 1))
            running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
            running_variance.value = MOMENTUM * running_variance.value + (1 - MOMENTUM) * unbiased
        return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


def _ones_and_noise(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Normal with mean 1 and deviation 0.02, as the PatchGAN's authors start it."""
    return 1 + nn.initializers.normal(0.02)(key, shape, dtype)
