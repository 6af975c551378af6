"""What trains, with its data: the tokenizer, and the class-conditional model on a frozen tokenizer."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bitdance_jax.config import (
    AugmentConfig,
    ClassConditionalTraining,
    DataConfig,
    TokenizerTraining,
    Training,
    to_dict,
)
from bitdance_jax.data.loader import make_loader
from bitdance_jax.data.records import ImageSource
from bitdance_jax.data.sources import count_classes, open_sources, summary
from bitdance_jax.data.tokens import Versions, check_tokens
from bitdance_jax.errors import UserError
from bitdance_jax.io import image_files, model_folder
from bitdance_jax.io.model_lookup import RunRecord, fingerprint
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.train.frozen_tokenizer import load_tokenizer
from bitdance_jax.train.latents import cached_latents
from bitdance_jax.train.objectives import ClassConditionalObjective, TokenizerObjective
from bitdance_jax.train.task import Batches, Params, Task


PREVIEW_IMAGES = 16
PREVIEW_CLASSES, PREVIEW_COLUMNS = 10, 8
PREVIEW_TOKENS = 5120
"""Tokens drawn at a time, to bound the cache beside the training state: for H-1x, 20 images of 256 tokens take 2.6 GB of it."""


class _Records:
    """The training records and the held-out ones of a task, and their batches.

    Attributes:
      batch_size, steps_per_epoch, held_out_size: as in Task.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        image_size: int,
        train: ImageSource,
        held_out: ImageSource,
    ) -> None:
        self._data, self._seed, self._image_size = data, seed, image_size
        self._source, self._held_out = train, held_out
        self.batch_size = data.batch_size
        self.steps_per_epoch = len(train) / data.batch_size
        self.held_out_size = len(held_out)

    def batches(self, rows: np.ndarray) -> Batches:
        data = self._data
        return make_loader(
            self._source,
            batch_size=data.batch_size,
            rows=rows,
            seed=self._seed,
            image_size=self._image_size,
            augment=data.augment,
            workers=data.workers,
        )

    def held_out(self, rows: np.ndarray) -> Batches:
        return self._held_out_batches(self.batch_size, rows)

    def _held_out_batches(self, batch_size: int, rows: np.ndarray | None = None) -> Batches:
        return make_loader(
            self._held_out,
            batch_size=batch_size,
            rows=rows,
            seed=0,
            image_size=self._image_size,
            shuffle=False,
        )


class TokenizerTask(_Records):
    """Trains the tokenizer; draws reconstructions of held-out images."""

    def __init__(self, config: TokenizerTraining) -> None:
        self._config = config
        self.objective = TokenizerObjective(config)
        self.frozen: Params = {}
        if config.data.gives_codes:
            raise UserError(
                "a tokenizer trains on images; leave out --data.source tokens and --data.cache-latents"
            )
        super().__init__(
            config.data, config.run.seed, config.image_size, *_open_sources(config.data)
        )
        self._reconstruct = jax.jit(self.objective.reconstruct)
        self.record = RunRecord(
            "tokenizer",
            to_dict(config.model),
            {"image_size": config.image_size},
            config.run.checkpoints,
        )

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        originals = next(self._held_out_batches(PREVIEW_IMAGES))["image"]
        keys = jax.random.split(jax.random.key(0), len(originals))
        pairs = np.concatenate([originals, self._reconstruct(ema_params, originals, keys)])
        return {"reconstructions": image_files.grid(pairs, columns=len(originals))}

    def export(self, ema_params: Params, figures: dict[str, float], folder: str) -> None:
        params = _cast(ema_params, self._config.run.export_dtype)
        _save(folder, self.record, self._config.run.steps, figures, params)


class ClassConditionalTask(_Records):
    """Trains transformer and head on the bits of a frozen tokenizer; draws samples."""

    def __init__(self, config: ClassConditionalTraining) -> None:
        self._config = config
        self.objective = ClassConditionalObjective(config)
        self._tokenizer = load_tokenizer(config.tokenizer, config.model.tokenizer)
        super().__init__(config.data, config.run.seed, config.model.image_size, *self._open())
        # From here on the tokenizer's weights stay in the host's memory: a step has its own copy of the encoder's, and devices are full.
        self._tokenizer.params = jax.tree.map(np.asarray, self._tokenizer.params)
        abstract = self.objective.abstract_frozen()
        self.frozen = jax.tree.map(
            lambda array, shape: array.astype(shape.dtype),
            {name: self._tokenizer.params[name] for name in abstract},
            abstract,
        )
        self._pipeline: ClassConditionalPipeline | None = None
        self.record = self._record()

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        config, names = self._config, self._source.class_names
        if self._pipeline is None:
            dtype = jnp.dtype(config.run.compute_dtype)
            self._pipeline = ClassConditionalPipeline(
                config.model, {}, self._tokenizer, sampler=config.preview, dtype=dtype
            )
        self._pipeline.set_params(ema_params)
        classes = np.unique(
            np.linspace(0, len(names) - 1, PREVIEW_CLASSES).astype(int)
        )  # Neighbours of ImageNet look alike.
        labels = np.repeat(classes, PREVIEW_COLUMNS).tolist()
        at_a_time = max(1, PREVIEW_TOKENS // config.model.num_tokens)
        samples = self._pipeline.sample(
            labels, config.run.seed, batch_size=at_a_time, progress=False
        )
        self._pipeline.set_params({})
        return {
            "samples": image_files.grid(
                samples, PREVIEW_COLUMNS, [names[label] for label in classes]
            )
        }

    def export(self, ema_params: Params, figures: dict[str, float], folder: str) -> None:
        run = self._config.run
        params = _cast({"model": ema_params, "tokenizer": self._tokenizer.params}, run.export_dtype)
        _save(folder, self.record, run.steps, figures, params)

    def _record(self) -> RunRecord:
        config, folder = self._config, self._config.tokenizer
        metadata = {
            "class_names": list(self._source.class_names),
            "sampler": to_dict(config.preview),
        }
        tokenizer = (folder, fingerprint(folder))
        return RunRecord(
            "class_conditional", to_dict(config.model), metadata, config.run.checkpoints, tokenizer
        )

    def _open(self) -> tuple[ImageSource, ImageSource]:
        """The training records and the held-out ones."""
        config, data, tokenizer = self._config, self._config.data, self._tokenizer
        if data.source == "tokens":
            for folder in filter(None, (data.path, data.held_out)):
                manifest = check_tokens(
                    folder, tokenizer.config, tokenizer.params, config.model.image_size
                )
                if folder == data.path:
                    _note_missing_flips(folder, manifest.versions, data.augment)
        train, held_out = _open_sources(data)
        classes = len(train.class_names)
        if classes != config.model.num_classes:
            raise UserError(
                f"the images have {classes} classes and the model {config.model.num_classes}; set --model.num-classes {classes}"
            )
        if not data.cache_latents:
            return train, held_out
        workdir, size, flips = (
            Path(config.run.workdir),
            config.model.image_size,
            data.augment.flip > 0,
        )
        return (
            cached_latents(workdir / "tokens_train", train, tokenizer, size, flips),
            cached_latents(workdir / "tokens_heldout", held_out, tokenizer, size, flips),
        )


def _open_sources(data: DataConfig) -> tuple[ImageSource, ImageSource]:
    """The training records and the held-out ones; says what they are, before anything is computed from them."""
    train, held_out = open_sources(data)
    if jax.process_index() == 0:
        tqdm.write(summary(train, held_out), file=sys.stderr)
    return train, held_out


def _note_missing_flips(folder: str, versions: Versions, augment: AugmentConfig) -> None:
    """Tokens of unflipped centre crops, where training is to show flipped ones."""
    shows_centre = not versions.crops or augment.decay_start is not None
    if augment.flip and shows_centre and not versions.flips and jax.process_index() == 0:
        print(
            f"note: the tokens in {folder} hold no mirror images, so that centre crops are not flipped; make them with --flips",
            file=sys.stderr,
        )


def with_classes_of_data(config: Training) -> Training:
    """The config with as many classes as its data has, where that is known without opening it.

    Raises:
      UserError: the data is missing or laid out in another way.
    """
    if not isinstance(config, ClassConditionalTraining):
        return config
    classes = count_classes(config.data) or config.model.num_classes
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=classes))


def make_task(config: Training) -> Task:
    """The task of a training config."""
    return (
        TokenizerTask(config)
        if isinstance(config, TokenizerTraining)
        else ClassConditionalTask(config)
    )


def _save(
    folder: str, record: RunRecord, steps: int, figures: dict[str, float], params: Params
) -> None:
    """Writes a run's model folder."""
    metadata = {"steps": steps, **record.metadata, "held_out": figures}
    model_folder.save(
        folder,
        kind=record.kind,
        config=record.config,
        params=params,
        metadata=metadata,
        force=True,
    )


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda a: np.asarray(a).astype(jnp.dtype(dtype)), params)
