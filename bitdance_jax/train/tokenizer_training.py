"""Training the tokenizer (paper sections 3.1 and 4.1)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bitdance_jax.config import TokenizerConfig, TokenizerLossConfig, to_dict
from bitdance_jax.config.plain import PathName, Positive, Size, require
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.crop_sizes import CropSizes
from bitdance_jax.errors import ConfigError
from bitdance_jax.fid import inception
from bitdance_jax.io import image_files
from bitdance_jax.io.model_lookup import RunRecord, fingerprint
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.tokenizer import autoencoder, discriminator
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.codes import to_latents
from bitdance_jax.tokenizer.losses import ImageTerm, tokenizer_loss
from bitdance_jax.train import adversary
from bitdance_jax.train.adversary import Adversary
from bitdance_jax.train.image_task import (
    ImageTask,
    TaskData,
    abstract_images,
    open_splits,
    save_model,
)
from bitdance_jax.train.reconstruction_metrics import (
    bit_metrics,
    inception_features,
    pixel_metrics,
    rfid,
)
from bitdance_jax.train.task import Batch, Metrics, Objective, Params, TrainingConfig
from bitdance_jax.train.tokenizer_weights import (
    PERCEPTUAL_NETWORKS,
    read_frozen,
    read_tokenizer,
    with_noise_inputs,
)


PREVIEW_IMAGES = 16

ImageTerms = dict[str, tuple[Any, ImageTerm]]
"""By name, weight and term."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(TrainingConfig):
    """A training run of the tokenizer.

    Attributes:
      model: its sizes.
      image_size: of the images, in pixels.
      crop_sizes: of the training crops, in pixels; each batch has one of them. (): `image_size`,
        which remains that of the held-out images.
      crop_weights: relative frequencies of the `crop_sizes`; (): all alike.
      loss: weights of the loss terms.
      inception: file with the weights of FID's Inception-v3; then the metrics of the held-out
        images contain rFID. None: they do not.
      train_encoder: False: the encoder is that of `init`, and only the decoder is trained, as in
        the second stage of a tokenizer with a GAN decoder. A plain decoder in `init` is widened.
    """

    model: TokenizerConfig
    image_size: Size
    crop_sizes: tuple[Size, ...] = ()
    crop_weights: tuple[Positive, ...] = ()
    loss: TokenizerLossConfig = TokenizerLossConfig()
    inception: PathName | None = None
    train_encoder: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.model.downsampling
        for name, side in self._sides():
            require(
                side % factor == 0,
                f"{name} must be a multiple of the downsampling {factor}, got {side}",
                name,
            )
        require(
            len(self.crop_weights) in (0, len(self.crop_sizes)),
            f"crop_weights must be as many as crop_sizes, got {len(self.crop_weights)} and "
            f"{len(self.crop_sizes)}",
            "crop_weights",
        )
        require(
            self.model.image_channels == 3,
            f"training images are RGB; set model.image_channels 3, got {self.model.image_channels}",
            "model.image_channels",
        )
        require(
            self.train_encoder or self.init is not None,
            "train_encoder False needs the encoder of a trained tokenizer; set init",
            "init",
        )
        for term, smallest in _smallest_sides(self.loss).items():
            for name, side in self._sides():
                require(
                    side >= smallest,
                    f"loss.{term} needs images of at least {smallest} pixels, got {name} {side}; "
                    f"set loss.{term} 0 or a larger {name}",
                    name,
                )
        require(
            not self.loss.adversarial or self.run.accumulate == 1,
            "the discriminator's batch statistics are those of the complete batch; set "
            "run.accumulate 1 or loss.adversarial 0",
            "run.accumulate",
        )

    def crops(self) -> CropSizes:
        """The sizes of the training crops."""
        sizes = self.crop_sizes or (self.image_size,)
        return CropSizes(sizes, self.crop_weights or (1.0,) * len(sizes), self.run.seed)

    def _sides(self) -> list[tuple[str, int]]:
        """The fields with sides of images, and their values."""
        return [
            ("image_size", self.image_size),
            *(("crop_sizes", side) for side in self.crop_sizes),
        ]

    def make_objective(self) -> "TokenizerObjective":
        return TokenizerObjective(self)

    def make_task(self) -> "TokenizerTask":
        return TokenizerTask(self)

    def trial(self) -> "TokenizerTraining":
        return dataclasses.replace(
            self,
            run=self.trial_run(steps=50),
            data=DataConfig(batch_size=8, augment=self.data.augment),
            image_size=64,
            crop_sizes=(),
            crop_weights=(),
            model=dataclasses.replace(self.model, ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1),
            optimizer=dataclasses.replace(
                self.optimizer,
                learning_rate=2e-3,
                warmup_steps=5,
                decay_start=None,
                ema_decay=0.9,
                ema_warmup=True,
            ),
            loss=dataclasses.replace(self.loss, perceptual=0.0),
            profile=None,
            init=None,
            train_encoder=True,
        )

    def read_initial(self, folder: str) -> tuple[Params, frozenset[str]]:
        params = read_tokenizer(folder)
        bits = self.model.bits
        is_plain = params["decoder"]["conv_in"]["kernel"].shape[2] == bits
        if self.model.decoder == "gan" and is_plain:
            params = {**params, "decoder": with_noise_inputs(params["decoder"], bits)}
        if not self.train_encoder:
            params = {"decoder": params["decoder"]}
        return params, frozenset()


def _smallest_sides(loss: TokenizerLossConfig) -> dict[str, int]:
    """Pixels that an image needs at least, by the field of the loss that needs them."""
    sides = {}
    if loss.perceptual:
        sides["perceptual"] = PERCEPTUAL_NETWORKS[loss.perceptual_network].smallest_side
    if loss.adversarial:
        sides["adversarial"] = discriminator.smallest_side(loss.discriminator.layers)
    return sides


class TokenizerObjective(Objective):
    """The tokenizer's losses, against a discriminator if `loss.adversarial` is positive.

    The auxiliary state is the discriminator's (`train.adversary`). Frozen weights are those of
    the perceptual network, of Inception-v3 for rFID and, with `train_encoder=False`, the encoder's.
    """

    sharding_rules = (*adversary.SHARDING_RULES, (r"(perceptual|inception)/.*", PartitionSpec()))

    def __init__(self, config: TokenizerTraining) -> None:
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


class TokenizerTask(ImageTask):
    """Trains the tokenizer; its previews are reconstructions of held-out images."""

    def __init__(self, config: TokenizerTraining) -> None:
        if config.data.gives_codes:
            raise ConfigError(
                "a tokenizer is trained on images; "
                "set neither data.source tokens nor data.cache_latents",
                "data",
            )
        data, seed = config.data, config.run.seed
        train, held_out = open_splits(data)
        super().__init__(
            TaskData(
                data,
                seed,
                config.image_size,
                train,
                held_out,
                config.crops() if config.crop_sizes else None,
            )
        )
        if config.inception is not None and self.held_out_size < 2:
            raise ConfigError(
                f"rFID needs at least two held-out images, got {self.held_out_size}", "inception"
            )
        self._export_dtype = config.run.export_dtype
        self.objective = config.make_objective()
        encoder_of = None if config.train_encoder else local_folder(config.init)
        self.frozen = read_frozen(config.loss, inception=config.inception, encoder_of=encoder_of)
        self.record = RunRecord(
            "tokenizer",
            to_dict(config.model),
            {"image_size": config.image_size},
            config.run.checkpoints,
            None if encoder_of is None else (encoder_of, fingerprint(encoder_of)),
        )
        self._reconstruct = jax.jit(self.objective.reconstruct)

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        originals = next(self._data.held_out_batches(PREVIEW_IMAGES))["image"]
        keys = jax.random.split(jax.random.key(0), len(originals))
        reconstructions = self._reconstruct(ema_params, self.frozen, originals, keys)
        pairs = np.concatenate([originals, reconstructions])
        return {"reconstructions": image_files.grid(pairs, columns=len(originals))}

    def export(
        self, ema_params: Params, folder: str, *, step: int, metrics: dict[str, float]
    ) -> None:
        # An encoder that was not trained is part of the tokenizer all the same.
        params = {name: part for name, part in self.frozen.items() if name == "encoder"}
        params |= ema_params
        record = self.record
        if spread := metrics.get("latent_std"):
            # A model learns latents of about unit variance.
            scale = float(f"{record.config['latent_scale'] / spread:.4g}")
            record = dataclasses.replace(record, config=record.config | {"latent_scale": scale})
        dtype = self._export_dtype
        save_model(folder, record, params, step=step, metrics=metrics, dtype=dtype)
