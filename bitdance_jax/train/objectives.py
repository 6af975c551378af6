"""The two things that train: the tokenizer, and the class-conditional model on a frozen tokenizer's bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bitdance_jax.config import ClassConditionalTraining, TokenizerTraining, Training
from bitdance_jax.distributed.constraints import map_rows
from bitdance_jax.io import image_files
from bitdance_jax.models.class_conditional import (
    ClassConditional,
    class_conditional_loss,
    draw,
    init_params,
)
from bitdance_jax.nn.attention import choose_kernel
from bitdance_jax.tokenizer import autoencoder, lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.losses import tokenizer_loss
from bitdance_jax.train.latents import unpack
from bitdance_jax.train.task import Batch, Objective, Params


ENCODER_PIXELS = 2**19
"""Pixels that a device encodes at a time (8 images of 256 x 256): the finest level's activations are what fills memory."""


class TokenizerObjective:
    """Reconstruction, entropy and commitment (SPEC 1); evaluates PSNR in dB. Nothing is frozen."""

    def __init__(self, config: TokenizerTraining) -> None:
        self._config = config
        self._model = Autoencoder(config.model, jnp.dtype(config.run.compute_dtype))

    def init(self, key: jax.Array) -> Params:
        size = self._config.image_size
        image = jnp.zeros((1, size, size, self._config.model.image_channels))
        return self._model.init(key, image, self._decoder_noise(key[None]))["params"]

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = image_files.to_model(batch["image"])
        return tokenizer_loss(
            self._model, params, images, self._decoder_noise(keys), self._config.loss
        )

    def evaluate(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> dict[str, jax.Array]:
        images = batch["image"]
        error = self.reconstruct(params, images, keys).astype(jnp.float32) - images.astype(
            jnp.float32
        )
        return {
            "psnr": jnp.mean(10 * jnp.log10(255.0**2 / jnp.mean(jnp.square(error), axis=(1, 2, 3))))
        }

    def reconstruct(self, params: Params, images: jax.Array, keys: jax.Array) -> jax.Array:
        """Bytes [B, H, W, 3] through the tokenizer and back."""
        z: Any = self._model.apply(
            {"params": params}, image_files.to_model(images), method="encode"
        )
        values: Any = self._model.apply(
            {"params": params}, lfq.quantize(z), self._decoder_noise(keys), method="decode"
        )
        return image_files.to_uint8(values)

    def no_decay(self, path: tuple[str, ...]) -> bool:
        return False

    def abstract_batch(self, batch_size: int) -> Batch:
        return _abstract_images(batch_size, self._config.image_size)

    def abstract_frozen(self) -> Params:
        return {}

    def without_fused_kernels(self) -> "TokenizerObjective":
        return self

    def _decoder_noise(self, keys: jax.Array) -> jax.Array | None:
        config = self._config
        if config.model.decoder == "plain":
            return None
        side = config.image_size // config.model.downsampling
        return jax.vmap(lambda key: jax.random.normal(key, (side, side, config.model.bits)))(keys)


class ClassConditionalObjective:
    """The head's velocity loss (SPEC 3, 4) on bits: read from the batch, or made from its images by the frozen encoder."""

    def __init__(self, config: ClassConditionalTraining) -> None:
        self._config = config
        dtype = jnp.dtype(config.run.compute_dtype)
        self._encoder = Autoencoder(config.model.tokenizer, dtype)
        remat = None if config.run.remat == "none" else config.run.remat
        kernel = choose_kernel(config.run.attention, dtype)
        self._model = ClassConditional(
            config.model, scan=True, remat=remat, dtype=dtype, kernel=kernel
        )

    def init(self, key: jax.Array) -> Params:
        return init_params(self._model, key)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        codes = self._codes(frozen, batch)
        return class_conditional_loss(
            self._model, params, batch["label"], codes, draw(keys, self._config.model)
        ), {}

    def evaluate(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> dict[str, jax.Array]:
        return {"loss": self.loss(params, frozen, batch, keys)[0]}

    def no_decay(self, path: tuple[str, ...]) -> bool:
        return path[0] in ("connector", "class_embedding", "query_tokens")

    def abstract_batch(self, batch_size: int) -> Batch:
        model = self._config.model
        batch = _abstract_images(batch_size, model.image_size)
        if self._config.data.gives_codes:
            del batch["image"]
            packed = (batch_size, model.grid, model.grid, -(-model.tokenizer.bits // 8))
            batch["codes"] = jax.ShapeDtypeStruct(packed, jnp.uint8)
        return batch

    def abstract_frozen(self) -> Params:
        if self._config.data.gives_codes:
            return {}
        encoder = autoencoder.abstract_params(self._config.model.tokenizer)["encoder"]
        return {
            "encoder": jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, self._encoder.dtype), encoder
            )
        }

    def without_fused_kernels(self) -> "ClassConditionalObjective":
        run = dataclasses.replace(self._config.run, attention="xla")
        return ClassConditionalObjective(dataclasses.replace(self._config, run=run))

    def _codes(self, frozen: Params, batch: Batch) -> jax.Array:
        """Codes [B, h, w, K] in {-1, 1}."""
        if "codes" in batch:
            return unpack(batch["codes"], self._config.model.tokenizer.bits)

        def encode(images: jax.Array) -> jax.Array:
            z: Any = self._encoder.apply(
                {"params": frozen}, image_files.to_model(images), method="encode"
            )
            return lfq.quantize(z)

        return map_rows(
            encode, batch["image"], max(1, ENCODER_PIXELS // self._config.model.image_size**2)
        )


def make_objective(config: Training) -> Objective:
    """The objective of a training config."""
    return (
        TokenizerObjective(config)
        if isinstance(config, TokenizerTraining)
        else ClassConditionalObjective(config)
    )


def _abstract_images(batch_size: int, size: int) -> Batch:
    return {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
