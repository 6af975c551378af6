"""The two things that train: the tokenizer, and the class-conditional model on a frozen tokenizer."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitdance_jax import images, model_folder
from bitdance_jax.config import ClassConditionalTraining, TokenizerTraining, Training, to_dict
from bitdance_jax.data.latents import EncodedBatches, cached_latents, unpack
from bitdance_jax.data.loader import make_loader
from bitdance_jax.data.sources import PictureSource, Split, open_source
from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.models.class_conditional import ClassConditional, class_conditional_loss, draw, init_params
from bitdance_jax.sampling.pipeline import ClassConditionalPipeline, Tokenizer, load
from bitdance_jax.tokenizer import lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.losses import tokenizer_loss
from bitdance_jax.train.task import Batch, Batches, Params, Task
from bitdance_jax.transformer.stack import stacked_axes


PREVIEW_IMAGES = 16
PREVIEW_CLASSES, PREVIEW_COLUMNS = 10, 8
EVALUATION_BATCH, EVALUATION_IMAGES = 50, 1000


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
        """Mean PSNR in dB over the first held-out pictures."""
        batches = _first(self._held_out_batches())
        figures = [psnr(np.asarray(self._reconstruct(ema_params, batch["image"])), batch["image"]) for batch in batches]
        return {"psnr": float(np.mean(np.concatenate(figures)))}

    def export(self, ema_params: Params, folder: str) -> None:
        figures = self.evaluate(ema_params)
        metadata = {"steps": self._config.run.steps, "image_size": self._config.image_size, "held_out": figures}
        params = _cast(ema_params, self._config.run.export_dtype)
        model_folder.save(folder, kind="tokenizer", config=to_dict(self._config.model), params=params, metadata=metadata)

    def batches(self) -> Batches:
        data = self._config.data
        return make_loader(
            self._source,
            batch_size=data.batch_size,
            seed=self._config.run.seed,
            image_size=self._config.image_size,
            augment=data.augment,
            workers=data.workers,
        )

    def _held_out_batches(self) -> Batches:
        self._held_out.set_state({"next_batch": 0})
        return self._held_out

    def _decoder_noise(self, key: jax.Array, batch: int) -> jax.Array | None:
        config = self._config
        if config.model.decoder == "plain":
            return None
        side = config.image_size // config.model.downsampling
        return jax.random.normal(key, (batch, side, side, config.model.bits))

    def _reconstruction(self, params: Params, pictures: jax.Array) -> jax.Array:
        z: Any = self._model.apply({"params": params}, images.to_model(pictures), method="encode")
        noise = self._decoder_noise(jax.random.key(0), len(pictures))
        values: Any = self._model.apply({"params": params}, lfq.quantize(z), noise, method="decode")
        return images.to_uint8(values)


class ClassConditionalTask:
    """Trains transformer and head on the bits of a frozen tokenizer; evaluates the loss on the held-out split."""

    def __init__(self, config: ClassConditionalTraining) -> None:
        self._config = config
        self._tokenizer = _load_tokenizer(config)
        source = open_source(config.data, "train")
        classes = len(source.class_names)
        if classes != config.model.num_classes:
            raise UserError(
                f"the pictures have {classes} classes and the model {config.model.num_classes}; set --model.num-classes {classes}"
            )
        self._source = self._cached(source, "train")
        self._held_out = self._cached(open_source(config.data, "heldout"), "heldout")
        remat = None if config.run.remat == "none" else config.run.remat
        dtype = jnp.dtype(config.run.compute_dtype)
        self._model = ClassConditional(config.model, scan=True, remat=remat, dtype=dtype, kernel=config.run.attention)
        self._held_out_loss = jax.jit(self.loss)
        self._pipeline: ClassConditionalPipeline | None = None
        self.steps_per_epoch = len(self._source) / config.data.batch_size

    def init(self, key: jax.Array) -> Params:
        return init_params(self._model, key)

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        codes = unpack(batch["codes"], self._config.model.tokenizer.bits)
        draws = draw(key, self._config.model, len(codes))
        return class_conditional_loss(self._model, params, batch["label"], codes, draws), {}

    def no_decay(self, path: tuple[str, ...]) -> bool:
        return path[0] in ("connector", "class_embedding", "query_tokens")

    def stacked_axes(self, path: tuple[str, ...]) -> int:
        return stacked_axes(path)

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        config, names = self._config, self._source.class_names[:PREVIEW_CLASSES]
        if self._pipeline is None:
            self._pipeline = ClassConditionalPipeline(config.model, ema_params, self._tokenizer, sampler=config.preview)
        self._pipeline.set_params(ema_params)
        labels = np.repeat(np.arange(len(names)), PREVIEW_COLUMNS).tolist()
        samples = self._pipeline.sample(labels, config.run.seed, batch_size=len(labels), progress=False)
        return {"samples": images.grid(samples, PREVIEW_COLUMNS, names)}

    def evaluate(self, ema_params: Params) -> dict[str, float]:
        """Mean loss over the first held-out pictures, with noise that is the same at every evaluation."""
        batches = self._batches(self._held_out, min(EVALUATION_BATCH, len(self._held_out)), training=False)
        losses = [float(self._held_out_loss(ema_params, batch, jax.random.key(i))[0]) for i, batch in enumerate(_first(batches))]
        return {"loss": float(np.mean(losses))}

    def export(self, ema_params: Params, folder: str) -> None:
        config = self._config
        metadata = {
            "steps": config.run.steps,
            "class_names": list(self._source.class_names),
            "sampler": to_dict(config.preview),
            "held_out": self.evaluate(ema_params),
        }
        params = _cast({"model": ema_params, "tokenizer": self._tokenizer.params}, config.run.export_dtype)
        model_folder.save(folder, kind="class_conditional", config=to_dict(config.model), params=params, metadata=metadata)

    def batches(self) -> Batches:
        return self._batches(self._source, self._config.data.batch_size, training=True)

    def _cached(self, source: PictureSource, split: Split) -> PictureSource:
        config = self._config
        if not config.data.cache_latents:
            return source
        path = Path(config.run.workdir) / f"latents_{split}.npz"
        return cached_latents(path, source, self._tokenizer, config.model.image_size, flips=config.data.augment.flip > 0)

    def _batches(self, source: PictureSource, batch_size: int, training: bool) -> Batches:
        config = self._config
        loader = make_loader(
            source,
            batch_size=batch_size,
            seed=config.run.seed,
            image_size=config.model.image_size,
            augment=config.data.augment if training else None,
            workers=config.data.workers if training else 0,
            shuffle=training,
            repeat=training,
        )
        return loader if config.data.cache_latents else EncodedBatches(loader, self._tokenizer)


def make_task(config: Training) -> Task:
    """The task of a training config."""
    return TokenizerTask(config) if isinstance(config, TokenizerTraining) else ClassConditionalTask(config)


def _load_tokenizer(config: ClassConditionalTraining) -> Tokenizer:
    tokenizer = load(config.tokenizer)
    if isinstance(tokenizer, ClassConditionalPipeline):
        tokenizer = tokenizer.tokenizer
    if tokenizer.config != config.model.tokenizer:
        raise UserError(f"the tokenizer in {config.tokenizer} is {tokenizer.config}, and model.tokenizer is {config.model.tokenizer}")
    return tokenizer


def _first(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Full batches up to EVALUATION_IMAGES pictures."""
    seen, size = 0, None
    for batch in batches:
        count = len(batch["label"])
        size = size or count
        if count < size or seen >= EVALUATION_IMAGES:
            return
        seen += count
        yield batch


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda a: np.asarray(a).astype(jnp.dtype(dtype)), params)
