"""The objective of tokenizer training (paper sections 3.1 and 4.1)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bitdance_jax.fid import inception
from bitdance_jax.io import image_files
from bitdance_jax.tokenizer import autoencoder
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.codes import to_latents
from bitdance_jax.tokenizer.losses import ImageTerm, tokenizer_loss
from bitdance_jax.train import adversary
from bitdance_jax.train.adversary import Adversary
from bitdance_jax.train.image_task import abstract_images
from bitdance_jax.train.reconstruction_metrics import (
    bit_metrics,
    inception_features,
    pixel_metrics,
    rfid,
)
from bitdance_jax.train.task import Batch, Metrics, Objective, Params
from bitdance_jax.train.tokenizer_config import TokenizerSettings
from bitdance_jax.train.tokenizer_weights import PERCEPTUAL_NETWORKS


ImageTerms = dict[str, tuple[Any, ImageTerm]]
"""By name, weight and term."""


class TokenizerObjective(Objective):
    """The tokenizer's losses, against a discriminator if `loss.adversarial` is positive.

    The auxiliary state is the discriminator's (`train.adversary`). Frozen weights are those of
    the perceptual network, of Inception-v3 for rFID and, with `train_encoder=False`, the encoder's.
    """

    sharding_rules = (*adversary.SHARDING_RULES, (r"(perceptual|inception)/.*", PartitionSpec()))

    def __init__(self, config: TokenizerSettings) -> None:
        self._config = config
        self._model = Autoencoder(
            config.model, jnp.dtype(config.run.compute_dtype), config.run.remat
        )
        self._adversary = Adversary(config.loss, config.image_size)

    def init(self, key: jax.Array) -> Params:
        size = self._config.image_size
        image = jnp.zeros((1, size, size, self._config.model.image_channels))
        params = self._model.init(key, image, self._noise(key[None], image))["params"]
        return params if self._config.train_encoder else {"decoder": params["decoder"]}

    def init_auxiliary(self, key: jax.Array) -> Params:
        return self._adversary.init(key) if self._config.loss.adversarial else {}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The loss without the adversarial term."""
        return self._loss(params, frozen, batch, keys, adversarial={})[:2]

    def auxiliary_loss(
        self,
        params: Params,
        auxiliary: Params,
        frozen: Params,
        batch: Batch,
        keys: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        config = self._config.loss
        if not config.adversarial:
            return super().auxiliary_loss(params, auxiliary, frozen, batch, keys, step)
        weight = config.adversarial * (step >= config.discriminator.start)
        if config.discriminator.adaptive:
            weight *= self._adaptive_weight(params, auxiliary, frozen, batch, keys)
        term = self._adversary.generator_term(auxiliary)
        terms: ImageTerms = {"adversarial": (weight, lambda fake, _: term(fake))}
        loss, metrics, reconstruction = self._loss(params, frozen, batch, keys, adversarial=terms)
        return loss, (metrics, jax.lax.stop_gradient(reconstruction))

    def update_auxiliary(
        self, auxiliary: Params, outputs: Any, batch: Batch, step: jax.Array
    ) -> tuple[Params, Metrics]:
        if not self._config.loss.adversarial:
            return auxiliary, {}
        return self._adversary.update(
            auxiliary, real=image_files.to_model(batch["image"]), fake=outputs, step=step
        )

    def evaluate(self, params: Params, frozen: Params, batch: Batch, keys: jax.Array) -> Metrics:
        images = image_files.to_model(batch["image"])
        z, values = self._reconstruct(params, frozen, images, keys)
        reconstruction = image_files.to_uint8(values)
        metrics = pixel_metrics(reconstruction, batch["image"])
        is_bits = self._config.model.latents == "bits"
        metrics |= bit_metrics(z) if is_bits else {"latent_std": jnp.std(z)}
        if self._config.loss.perceptual:
            # Of what a user sees: clipped and rounded.
            seen = image_files.to_model(reconstruction)
            metrics["perceptual"] = self._perceptual(frozen)(seen, images)
        if self._config.inception is not None:
            metrics |= inception_features(frozen["inception"], reconstruction, batch["image"])
        return metrics

    def summarize(self, features: dict[str, np.ndarray]) -> dict[str, float]:
        return rfid(features)

    def reconstruct(
        self, params: Params, frozen: Params, images: jax.Array, keys: jax.Array
    ) -> jax.Array:
        """Encodes and decodes uint8 images [B, H, W, 3]."""
        _, values = self._reconstruct(params, frozen, image_files.to_model(images), keys)
        return image_files.to_uint8(values)

    def abstract_batch(self, batch_size: int) -> Batch:
        return abstract_images(batch_size, max(self._config.crops().sizes))

    @property
    def mean_work(self) -> float:
        # Convolutions take time in proportion to the area.
        crops = self._config.crops()
        areas = np.square(np.array(crops.sizes) / max(crops.sizes))
        return float(np.average(areas, weights=crops.weights))

    def abstract_frozen(self) -> Params:
        frozen: Params = {}
        if self._config.loss.perceptual:
            network = PERCEPTUAL_NETWORKS[self._config.loss.perceptual_network]
            frozen["perceptual"] = network.abstract_params()
        if self._config.inception is not None:
            frozen["inception"] = inception.abstract_params()
        if not self._config.train_encoder:
            frozen["encoder"] = autoencoder.abstract_params(self._config.model)["encoder"]
        return frozen

    def _loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        keys: jax.Array,
        adversarial: ImageTerms,
    ) -> tuple[jax.Array, Metrics, jax.Array]:
        """Loss, metrics and the reconstruction."""
        images = image_files.to_model(batch["image"])
        outputs: Any = self._model.apply(
            self._variables(params, frozen), images, self._noise(keys, images)
        )
        reconstruction, z = outputs
        config = self._config.loss
        terms: ImageTerms = {}
        if config.perceptual:
            terms["perceptual"] = (config.perceptual, self._perceptual(frozen))
        loss, metrics = tokenizer_loss(
            reconstruction,
            z,
            images,
            config=config,
            num_codebooks=self._config.model.num_codebooks,
            latents=self._config.model.latents,
            image_terms=terms | adversarial,
        )
        return loss, metrics, reconstruction

    def _perceptual(self, frozen: Params) -> ImageTerm:
        distance = PERCEPTUAL_NETWORKS[self._config.loss.perceptual_network].distance

        def term(reconstruction: jax.Array, images: jax.Array) -> jax.Array:
            reconstruction = reconstruction.astype(jnp.float32)
            return jnp.mean(distance(frozen["perceptual"], reconstruction, images))

        return term

    def _adaptive_weight(
        self, params: Params, auxiliary: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> jax.Array:
        """Ratio of the norms of two gradients at the decoder's last kernel (arXiv 2012.09841).

        The first is of the reconstruction and perceptual losses, the second of the adversarial one.
        """
        params, auxiliary = jax.lax.stop_gradient((params, auxiliary))
        images = image_files.to_model(batch["image"])
        config = self._config.loss

        def decode(kernel: jax.Array) -> jax.Array:
            decoder = params["decoder"]
            last = {**decoder["conv_out"], "kernel": kernel}
            replaced = params | {"decoder": decoder | {"conv_out": last}}
            return self._reconstruct(replaced, frozen, images, keys)[1].astype(jnp.float32)

        def reconstruction_loss(values: jax.Array) -> jax.Array:
            error = values - images
            loss = config.l1 * jnp.mean(jnp.abs(error)) + config.l2 * jnp.mean(jnp.square(error))
            if config.perceptual:
                loss += config.perceptual * self._perceptual(frozen)(values, images)
            return loss

        values, pull_back = jax.vjp(decode, params["decoder"]["conv_out"]["kernel"])
        (of_reconstruction,) = pull_back(jax.grad(reconstruction_loss)(values))
        (of_adversary,) = pull_back(jax.grad(self._adversary.generator_term(auxiliary))(values))
        ratio = jnp.linalg.norm(of_reconstruction) / (jnp.linalg.norm(of_adversary) + 1e-4)
        return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))

    def _reconstruct(
        self, params: Params, frozen: Params, images: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The encoder's output, and the decoder's of its latents; images in [-1, 1]."""
        model, variables = self._config.model, self._variables(params, frozen)
        z: Any = self._model.apply(variables, images, method="encode")
        noise = self._noise(keys, images) if model.decoder == "gan" else None
        latents = to_latents(z, model.latents)
        values: Any = self._model.apply(variables, latents, noise, method="decode")
        return z, values

    def _variables(self, params: Params, frozen: Params) -> dict[str, Params]:
        if self._config.train_encoder:
            return {"params": params}
        return {"params": {**params, "encoder": frozen["encoder"]}}

    def _noise(self, keys: jax.Array, images: jax.Array) -> jax.Array | None:
        """Of a GAN decoder, or of samples of continuous latents; None where there is neither."""
        model = self._config.model
        if model.decoder == "plain" and model.latents == "bits":
            return None
        height, width = (side // model.downsampling for side in images.shape[1:3])
        return jax.vmap(lambda key: jax.random.normal(key, (height, width, model.bits)))(keys)
