"""The tokenizer between images and latents: bits (paper 3.1), or real numbers (tables 12, 13)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.errors import UserError
from bitdance_jax.tokenizer import kl, lfq, uniwetok
from bitdance_jax.tokenizer.decoder import Decoder
from bitdance_jax.tokenizer.encoder import Encoder
from bitdance_jax.tokenizer.layers import Remat


class Autoencoder(nn.Module):
    """Encoder and decoder; called, both one after the other with straight-through gradients.

    Attributes:
      config: sizes.
      dtype: compute type; parameters are float32, and so is the encoder's output.
      remat: what the backward pass stores of a residual block (`layers.residual_block`).
    """

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    def setup(self) -> None:
        encoder: Any = Encoder
        decoder: Any = Decoder
        if self.config.latents == "continuous":
            encoder, decoder = kl.Encoder, kl.Decoder
        elif self.config.attention_blocks:
            encoder, decoder = uniwetok.Encoder, uniwetok.Decoder
        self.encoder = encoder(self.config, self.dtype, self.remat)
        self.decoder = decoder(self.config, self.dtype, self.remat)

    def encode(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w K"]:
        """Values of which `codes.to_latents` makes bits; continuous latents themselves.

        Continuous latents are the means of their distributions, times `latent_scale`.

        Args:
          images: in [-1, 1], with sides divisible by the downsampling.

        Raises:
          UserError: images of other sizes or channels.
        """
        values = self._encode(images)
        if self.config.latents == "bits":
            return values
        return self.config.latent_scale * kl.split_moments(values)[0]

    def _encode(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w V"]:
        down = self.config.downsampling
        height, width, channels = images.shape[1:]
        if height % down or width % down or channels != self.config.image_channels:
            raise UserError(
                f"the tokenizer takes images of {self.config.image_channels} channels with sides "
                f"divisible by {down}, got {height}x{width} with {channels}; crop or resize them"
            )
        return self.encoder(images)

    def decode(
        self, codes: Float[Array, "B h w K"], noise: Float[Array, "B h w K"] | None = None
    ) -> Float[Array, "B H W C"]:
        """Images, about [-1, 1].

        Args:
          codes: in {-1, 1}, or continuous latents.
          noise: standard normal, for a GAN decoder; None for a plain one.

        Raises:
          UserError: see `check_codes`.
        """
        check_codes(self.config, codes, noise)
        if self.config.latents == "continuous":
            return self.decoder(codes / self.config.latent_scale)
        return self.decoder(codes, noise)

    def __call__(
        self, images: Float[Array, "B H W C"], noise: Float[Array, "B h w K"] | None = None
    ) -> tuple[Float[Array, "B H W C"], Float[Array, "B h w V"]]:
        """Reconstruction, and the encoder's output: values before the sign, or `kl` moments.

        Gradients pass through the sign unchanged. For continuous latents, `noise` samples from
        their distributions; None: their means.
        """
        z = self._encode(images)
        if self.config.latents == "bits":
            return self.decode(lfq.quantize_straight_through(z), noise), z
        latents, log_variance = kl.split_moments(z)
        if noise is not None:
            latents += jnp.exp(0.5 * log_variance) * noise
        return self.decoder(latents), z


def check_codes(
    config: TokenizerConfig,
    codes: Float[Array, "B h w K"],
    noise: Float[Array, "B h w K"] | None,
) -> None:
    """Raises a UserError for codes, or noise, that the decoder cannot take."""
    if codes.shape[-1] != config.bits:
        raise UserError(f"the tokenizer's codes have {config.bits} bits, got {codes.shape[-1]}")
    if config.latents == "bits" and codes.shape[1] * codes.shape[2] < 2:
        raise UserError(
            "one token is too small an image: the decoder needs the spread over at least two"
        )
    if (noise is not None) != (config.decoder == "gan"):
        needed = "noise" if noise is None else "no noise"
        raise UserError(f"a {config.decoder} decoder takes {needed}")


def abstract_params(config: TokenizerConfig) -> dict[str, Any]:
    """Shapes of the parameters, float32, without computing any."""
    side = config.downsampling
    image = jax.ShapeDtypeStruct((1, 2 * side, 2 * side, config.image_channels), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, 2, 2, config.bits), jnp.float32)
    arguments = (image, noise) if config.decoder == "gan" else (image,)
    return jax.eval_shape(Autoencoder(config).init, jax.random.key(0), *arguments)["params"]
