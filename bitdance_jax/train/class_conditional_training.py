"""Training the class-conditional model on the bits of a frozen tokenizer (paper section 4.2)."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitdance_jax.config import (
    AugmentConfig,
    ClassConditionalConfig,
    SamplerConfig,
    TokenizerConfig,
    from_dict,
    to_dict,
)
from bitdance_jax.config.plain import PathName
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.records import ImageSource
from bitdance_jax.data.tokens import Versions, check_tokens
from bitdance_jax.distributed.constraints import map_rows
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io import image_files, model_lookup
from bitdance_jax.io.manifest import IN_WORDS
from bitdance_jax.io.model_lookup import RunRecord, fingerprint
from bitdance_jax.io.progress import report
from bitdance_jax.models.class_conditional import (
    ClassConditional,
    class_conditional_loss,
    init_params,
    training_noise,
)
from bitdance_jax.nn.attention import check_kernel, choose_kernel
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.tokenizer import autoencoder
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.codes import to_latents, unpack
from bitdance_jax.train.frozen_tokenizer import load_tokenizer, report_other_tokenizer
from bitdance_jax.train.image_task import (
    ImageTask,
    TaskData,
    abstract_images,
    open_splits,
    save_model,
)
from bitdance_jax.train.latents import cached_latents
from bitdance_jax.train.task import Batch, Metrics, Objective, Params, TrainingConfig


ENCODER_PIXELS = 2**19
"""Pixels that a device encodes at a time (8 images of 256 x 256): the activations of the finest
level fill the memory."""
PREVIEW_CLASSES = 10
PREVIEW_COLUMNS = 8
PREVIEW_TOKENS = 5120
"""Tokens of the previews that are sampled at a time, to bound the KV cache beside the training
state: for H-1x, 20 images of 256 tokens need 2.6 GB."""

CLASS_EMBEDDING = "class_embedding/embedding"


@dataclass(frozen=True, kw_only=True)
class ClassConditionalTraining(TrainingConfig):
    """A training run of the class-conditional model.

    Attributes:
      model: its sizes.
      tokenizer: model folder, or Hugging Face id, of the trained tokenizer, which is frozen here;
        its sizes must be `model.tokenizer`.
      preview: the sampler of the image grids while training, and of the exported model.
    """

    model: ClassConditionalConfig
    tokenizer: PathName
    preview: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(head_steps=20, guidance_scale=2.0)
    )

    def make_objective(self) -> "ClassConditionalObjective":
        return ClassConditionalObjective(self)

    def make_task(self) -> "ClassConditionalTask":
        return ClassConditionalTask(self)

    def trial(self) -> "ClassConditionalTraining":
        if self.model.tokenizer.latents == "continuous":
            raise ConfigError(
                "there is no trial on continuous latents: the embedded tokenizer has bits; "
                "train a small one: bitdance train emoji_tokenizer --latents continuous",
                "trial",
            )
        embedded = model_lookup.read_config(model_lookup.EMBEDDED).config["tokenizer"]
        replace = dataclasses.replace
        model = replace(
            self.model,
            tokenizer=from_dict(TokenizerConfig, embedded),
            transformer=replace(self.model.transformer, num_layers=2, dim=128, num_heads=4),
            head=replace(self.model.head, width=128),
            image_size=64,
        )
        trial = replace(
            self,
            run=self.trial_run(steps=20),
            data=DataConfig(batch_size=8, augment=self.data.augment),
            model=model,
            tokenizer=model_lookup.EMBEDDED,
            optimizer=replace(
                self.optimizer, warmup_steps=5, decay_start=None, ema_decay=0.8, ema_warmup=True
            ),
            preview=replace(self.preview, head_steps=10),
            profile=None,
            init=None,
        )
        return trial.with_classes_of_data()

    def with_classes_of_data(self) -> "ClassConditionalTraining":
        classes = self.data.count_classes() or self.model.num_classes
        return dataclasses.replace(self, model=dataclasses.replace(self.model, num_classes=classes))

    def read_initial(self, folder: str) -> tuple[Params, frozenset[str]]:
        kind = model_lookup.read_config(folder).kind
        if kind != "class_conditional":
            there = IN_WORDS[kind]
            raise UserError(
                f"init {folder} holds a {there}, and this run trains a class-conditional model"
            )
        saved = model_lookup.load(folder).params
        report_other_tokenizer(
            folder, saved["tokenizer"], load_tokenizer(self.tokenizer, self.model.tokenizer)
        )
        params = dict(saved["model"])
        classes = len(params["class_embedding"]["embedding"]) - 1
        if classes == self.model.num_classes:
            return params, frozenset()
        report(
            f"{folder} has {classes} classes and this run {self.model.num_classes}: "
            "the class embedding is initialized randomly"
        )
        del params["class_embedding"]
        return params, frozenset([CLASS_EMBEDDING])


class ClassConditionalObjective(Objective):
    """The head's velocity loss on bits, which a batch holds or the frozen encoder makes."""

    def __init__(self, config: ClassConditionalTraining) -> None:
        self._config = config
        dtype = jnp.dtype(config.run.compute_dtype)
        remat = None if config.run.remat == "none" else config.run.remat
        kernel = choose_kernel(config.run.attention, dtype)
        self._encoder = Autoencoder(config.model.tokenizer, dtype)
        self._model = ClassConditional(
            config.model, scan=True, remat=remat, dtype=dtype, kernel=kernel
        )

    def init(self, key: jax.Array) -> Params:
        return init_params(self._model, key)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        codes = self.codes(frozen, batch)
        noise = training_noise(keys, self._config.model)
        return class_conditional_loss(self._model, params, batch["label"], codes, noise), {}

    def evaluate(self, params: Params, frozen: Params, batch: Batch, keys: jax.Array) -> Metrics:
        return {"loss": self.loss(params, frozen, batch, keys)[0]}

    def no_decay(self, path: tuple[str, ...]) -> bool:
        return path[0] in ("connector", "class_embedding", "query_tokens")

    def abstract_batch(self, batch_size: int) -> Batch:
        model = self._config.model
        batch = abstract_images(batch_size, model.image_size)
        if self._config.data.gives_codes:
            del batch["image"]
            packed = (batch_size, model.grid, model.grid, model.tokenizer.packed_bytes)
            batch["codes"] = jax.ShapeDtypeStruct(packed, jnp.uint8)
        return batch

    def abstract_frozen(self) -> Params:
        if self._config.data.gives_codes:
            return {}
        encoder = autoencoder.abstract_params(self._config.model.tokenizer)["encoder"]
        dtype = self._encoder.dtype
        return {"encoder": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), encoder)}

    def counted(self) -> "tuple[ClassConditionalObjective, float]":
        run = dataclasses.replace(self._config.run, attention="xla")
        return type(self)(dataclasses.replace(self._config, run=run)), 1.0

    def codes(self, frozen: Params, batch: Batch) -> jax.Array:
        """The bits of a batch in {-1, 1}, or its continuous latents, float32 [B, h, w, K]."""
        if "codes" in batch:
            return unpack(batch["codes"], self._config.model.tokenizer)

        def encode(images: jax.Array) -> jax.Array:
            pixels = image_files.to_model(images)
            z: Any = self._encoder.apply({"params": frozen}, pixels, method="encode")
            return to_latents(z, self._config.model.tokenizer.latents)

        rows = max(1, ENCODER_PIXELS // self._config.model.image_size**2)
        return map_rows(encode, batch["image"], rows)


class ClassConditionalTask(ImageTask):
    """Trains transformer and head on a frozen tokenizer; its previews are samples."""

    def __init__(self, config: ClassConditionalTraining) -> None:
        check_kernel(config.run.attention)
        self._config = config
        self.objective = config.make_objective()
        self._tokenizer = load_tokenizer(config.tokenizer, config.model.tokenizer)
        data, size = config.data, config.model.image_size
        super().__init__(TaskData(data, config.run.seed, size, *self._open_splits()))
        # From here on the tokenizer is in host memory: the step has a copy of its encoder, and the
        # devices' memory is full.
        self._tokenizer.params = jax.tree.map(np.asarray, self._tokenizer.params)
        abstract = self.objective.abstract_frozen()
        self.frozen = jax.tree.map(
            lambda array, shape: array.astype(shape.dtype),
            {name: self._tokenizer.params[name] for name in abstract},
            abstract,
        )
        self._class_names = self._data.train.class_names
        self._pipeline: ClassConditionalPipeline | None = None
        self.record = self._record()

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        config, names = self._config, self._class_names
        if self._pipeline is None:
            dtype = jnp.dtype(config.run.compute_dtype)
            self._pipeline = ClassConditionalPipeline(
                config.model, None, self._tokenizer, sampler=config.preview, dtype=dtype
            )
        self._pipeline.set_params(ema_params)
        # Spread over all classes: neighbouring classes of ImageNet look alike.
        classes = np.unique(np.linspace(0, len(names) - 1, PREVIEW_CLASSES).astype(int))
        labels = np.repeat(classes, PREVIEW_COLUMNS).tolist()
        batch_size = max(1, PREVIEW_TOKENS // config.model.num_tokens)
        samples = self._pipeline.sample(
            labels, config.run.seed, batch_size=batch_size, progress=False
        )
        self._pipeline.set_params(None)
        titles = [names[label] for label in classes]
        return {"samples": image_files.grid(samples, PREVIEW_COLUMNS, titles)}

    def export(
        self, ema_params: Params, folder: str, *, step: int, metrics: dict[str, float]
    ) -> None:
        params = {"model": ema_params, "tokenizer": self._tokenizer.params}
        dtype = self._config.run.export_dtype
        save_model(folder, self.record, params, step=step, metrics=metrics, dtype=dtype)

    def _record(self) -> RunRecord:
        config = self._config
        metadata = {
            "class_names": list(self._class_names),
            "sampler": to_dict(config.preview),
        }
        folder = local_folder(config.tokenizer)
        tokenizer = (folder, fingerprint(folder))
        return RunRecord(
            "class_conditional", to_dict(config.model), metadata, config.run.checkpoints, tokenizer
        )

    def _open_splits(self) -> tuple[ImageSource, ImageSource]:
        """Training and held-out records: images, or the tokens of the tokenizer."""
        config, data = self._config, self._config.data
        if data.source == "tokens":
            self._check_tokens()
        train, held_out = open_splits(data)
        classes = len(train.class_names)
        if classes != config.model.num_classes:
            raise ConfigError(
                f"the images have {classes} classes and the model {config.model.num_classes}; "
                f"set model.num_classes {classes}",
                "model.num_classes",
            )
        if not data.cache_latents:
            return train, held_out
        workdir = Path(config.run.workdir)
        size = config.model.image_size
        flips = data.augment.flip > 0

        def cached(name: str, source: ImageSource) -> ImageSource:
            folder = workdir / name
            return cached_latents(folder, source, self._tokenizer, image_size=size, flips=flips)

        return cached("tokens_train", train), cached("tokens_heldout", held_out)

    def _check_tokens(self) -> None:
        data = self._config.data
        size = self._config.model.image_size
        tokenizer = self._tokenizer
        for folder in filter(None, (data.path, data.held_out)):
            manifest = check_tokens(folder, tokenizer.config, tokenizer.params, image_size=size)
            if folder == data.path:
                _note_missing_flips(folder, manifest.versions, data.augment)


def _note_missing_flips(folder: str, versions: Versions, augment: AugmentConfig) -> None:
    """Reports tokens of unflipped centre crops, if training asks for flipped ones."""
    shows_centre = not versions.crops or augment.decay_start is not None
    if augment.flip and shows_centre and not versions.flips:
        report(
            f"note: the tokens in {folder} hold no mirror images, so centre crops are not flipped; "
            "write the tokens with flips=True"
        )
