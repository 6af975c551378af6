"""Training the tokenizer: reconstruction, entropy and commitment losses (paper section 3.1)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitdance_jax.config import TokenizerConfig, TokenizerLossConfig, to_dict
from bitdance_jax.config.plain import Size, require
from bitdance_jax.data.config import DataConfig
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io import image_files, model_lookup
from bitdance_jax.io.model_lookup import RunRecord
from bitdance_jax.tokenizer import lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.losses import tokenizer_loss
from bitdance_jax.train.image_task import (
    ImageTask,
    TaskData,
    abstract_images,
    open_splits,
    save_model,
)
from bitdance_jax.train.task import Batch, Metrics, Objective, Params, TrainingConfig


PREVIEW_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(TrainingConfig):
    """A training run of the tokenizer.

    Attributes:
      model: its sizes.
      image_size: of the training crops, in pixels.
      loss: weights of the loss terms.
    """

    model: TokenizerConfig
    image_size: Size
    loss: TokenizerLossConfig = TokenizerLossConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.model.downsampling
        require(
            self.image_size % factor == 0,
            f"image_size must be a multiple of the downsampling {factor}, got {self.image_size}",
            "image_size",
        )

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
            model=dataclasses.replace(self.model, ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1),
            optimizer=dataclasses.replace(self.optimizer, warmup_steps=5, decay_start=None),
            profile=None,
            init=None,
        )

    def read_initial(self, folder: str) -> tuple[Params, frozenset[str]]:
        kind = model_lookup.read_config(folder).kind
        if kind not in ("tokenizer", "class_conditional"):
            raise UserError(f"init {folder} holds a {kind} model, and this run trains a tokenizer")
        params = model_lookup.load(folder).params
        return (params if kind == "tokenizer" else params["tokenizer"]), frozenset()


class TokenizerObjective(Objective):
    """The tokenizer's losses; evaluates PSNR in dB. No weights are frozen."""

    def __init__(self, config: TokenizerTraining) -> None:
        self._config = config
        self._model = Autoencoder(config.model, jnp.dtype(config.run.compute_dtype))

    def init(self, key: jax.Array) -> Params:
        size = self._config.image_size
        image = jnp.zeros((1, size, size, self._config.model.image_channels))
        return self._model.init(key, image, self._decoder_noise(key[None]))["params"]

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        images = image_files.to_model(batch["image"])
        noise = self._decoder_noise(keys)
        return tokenizer_loss(self._model, params, images, noise, self._config.loss)

    def evaluate(self, params: Params, frozen: Params, batch: Batch, keys: jax.Array) -> Metrics:
        images = batch["image"].astype(jnp.float32)
        error = self.reconstruct(params, batch["image"], keys).astype(jnp.float32) - images
        mean_squared = jnp.mean(jnp.square(error), axis=(1, 2, 3))
        return {"psnr": jnp.mean(10 * jnp.log10(255.0**2 / mean_squared))}

    def reconstruct(self, params: Params, images: jax.Array, keys: jax.Array) -> jax.Array:
        """Encodes and decodes uint8 images [B, H, W, 3]."""
        variables = {"params": params}
        z: Any = self._model.apply(variables, image_files.to_model(images), method="encode")
        codes, noise = lfq.quantize(z), self._decoder_noise(keys)
        values: Any = self._model.apply(variables, codes, noise, method="decode")
        return image_files.to_uint8(values)

    def abstract_batch(self, batch_size: int) -> Batch:
        return abstract_images(batch_size, self._config.image_size)

    def _decoder_noise(self, keys: jax.Array) -> jax.Array | None:
        config = self._config
        if config.model.decoder == "plain":
            return None
        side = config.image_size // config.model.downsampling
        return jax.vmap(lambda key: jax.random.normal(key, (side, side, config.model.bits)))(keys)


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
        super().__init__(TaskData(data, seed, config.image_size, *open_splits(data)))
        self._export_dtype = config.run.export_dtype
        self.objective = config.make_objective()
        self.frozen: Params = {}
        self.record = RunRecord(
            "tokenizer",
            to_dict(config.model),
            {"image_size": config.image_size},
            config.run.checkpoints,
        )
        self._reconstruct = jax.jit(self.objective.reconstruct)

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        originals = next(self._data.held_out_batches(PREVIEW_IMAGES))["image"]
        keys = jax.random.split(jax.random.key(0), len(originals))
        pairs = np.concatenate([originals, self._reconstruct(ema_params, originals, keys)])
        return {"reconstructions": image_files.grid(pairs, columns=len(originals))}

    def export(
        self, ema_params: Params, folder: str, *, step: int, metrics: dict[str, float]
    ) -> None:
        dtype = self._export_dtype
        save_model(folder, self.record, ema_params, step=step, metrics=metrics, dtype=dtype)
