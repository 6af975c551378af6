"""The two things that train: the tokenizer, and the class-conditional model on a frozen tokenizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitdance_jax import images, model_folder
from bitdance_jax.config import TokenizerTraining, to_dict
from bitdance_jax.data.loader import BatchIterator, make_loader
from bitdance_jax.data.sources import open_source
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.tokenizer import lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.losses import tokenizer_loss
from bitdance_jax.train.task import Batch, Params


PREVIEW_IMAGES = 16
EVALUATION_BATCH = 50


class TokenizerTask:
    """Trains the tokenizer on reconstruction, entropy and commitment; evaluates PSNR on the held-out split."""

    def __init__(self, config: TokenizerTraining) -> None:
        self._config = config
        self._model = Autoencoder(config.model, jnp.dtype(config.run.compute_dtype))
        self._source = open_source(config.data, "train")
        self._held_out = make_loader(
            open_source(config.data, "heldout"),
            batch_size=EVALUATION_BATCH, seed=0, image_size=config.image_size, shuffle=False, repeat=False,
        )  # fmt: skip
        self._reconstruct = jax.jit(self._reconstruction)
        self.steps_per_epoch = len(self._source) / config.data.batch_size

    def init(self, key: jax.Array) -> Params:
        size = self._config.image_size
        image = jnp.zeros((1, size, size, self._config.model.image_channels))
        noise = self._decoder_noise(key, 1)
        return self._model.init(key, image, noise)["params"]

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        pictures = images.to_model(batch["image"])
        noise = self._decoder_noise(key, len(pictures))
        return tokenizer_loss(self._model, params, pictures, noise, self._config.loss)

    def no_decay(self, path: tuple[str, ...]) -> bool:
        return False

    def stacked_axes(self, path: tuple[str, ...]) -> int:
        return 0

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        originals = next(self._held_out_batches())["image"][:PREVIEW_IMAGES]
        pairs = np.concatenate([originals, self._reconstruct(ema_params, originals)])
        return {"reconstructions": images.grid(pairs, columns=len(originals))}

    def evaluate(self, ema_params: Params) -> dict[str, float]:
        figures = [psnr(batch["image"], np.asarray(self._reconstruct(ema_params, batch["image"]))) for batch in self._held_out_batches()]
        return {"psnr": float(np.mean(np.concatenate(figures)))}

    def export(self, ema_params: Params, folder: str) -> None:
        figures = self.evaluate(ema_params)
        metadata = {"steps": self._config.run.steps, "image_size": self._config.image_size, "held_out": figures}
        model_folder.save(folder, kind="tokenizer", config=to_dict(self._config.model), params=ema_params, metadata=metadata)

    def batches(self) -> BatchIterator:
        data = self._config.data
        return make_loader(
            self._source,
            batch_size=data.batch_size,
            seed=self._config.run.seed,
            image_size=self._config.image_size,
            augment=data.augment,
            workers=data.workers,
        )

    def _held_out_batches(self) -> BatchIterator:
        self._held_out.set_state({"next_batch": 0})
        return self._held_out

    def _decoder_noise(self, key: jax.Array, batch: int) -> jax.Array | None:
        config = self._config
        if config.model.decoder == "plain":
            return None
        side = config.image_size // config.model.downsampling
        return jax.random.normal(key, (batch, side, side, config.model.bits))

    def _reconstruction(self, params: Params, pictures: jax.Array) -> jax.Array:
        z = self._model.apply({"params": params}, images.to_model(pictures), method="encode")
        noise = self._decoder_noise(jax.random.key(0), len(pictures))
        return images.to_uint8(self._model.apply({"params": params}, lfq.quantize(z), noise, method="decode"))


def make_task(config: Any) -> TokenizerTask:
    """The task of a training config."""
    return TokenizerTask(config)
