"""The score of a model's images over guidance scale and head steps: a table and a plot."""

import csv
import io
import itertools
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from bitdance_jax.config import MeshConfig, SamplerConfig
from bitdance_jax.data.emoji import emoji_images
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.evaluate.features import Extractor
from bitdance_jax.evaluate.images import ArrayImages, FolderImages, Images
from bitdance_jax.evaluate.metrics import collect
from bitdance_jax.evaluate.reference import Reference
from bitdance_jax.fid import inception, inception_weights
from bitdance_jax.fid.frechet import frechet_distance
from bitdance_jax.fid.inception import Features
from bitdance_jax.fid.statistics import Gaussian, RunningGaussian
from bitdance_jax.io import image_files, plot, readers
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.model_lookup import EMBEDDED, check_unchanged, fingerprint
from bitdance_jax.io.paths import local
from bitdance_jax.io.progress import Progress
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.pipelines.npz import balanced_labels
from bitdance_jax.tokenizer.autoencoder import Autoencoder


FID = "FID"
TOKENIZER_DISTANCE = "distance of the tokenizer's own features (not ImageNet FID)"


@dataclass(frozen=True)
class Setting:
    """What all rows of a sweep share.

    Attributes:
      checkpoint: model folder, local or gs://, or "emoji_classes".
      num_images: images of each pair, balanced over the classes.
      seed: of the images.
      inception: weights of the FID Inception-v3; None: the score is the Fréchet distance of
        features of the model's tokenizer, which only compares settings of this model.
      reference: the real images: an .npz of ADM's suite or a folder; "emoji": the embedded ones.
      batch_size: images generated at a time on each device.
      dtype: of weights and activations.

    Raises:
      ConfigError: inception without a reference.
    """

    checkpoint: str
    num_images: int
    seed: int
    inception: str | None
    reference: str
    batch_size: int
    dtype: str

    def __post_init__(self) -> None:
        if self.inception is not None and self.reference == EMBEDDED:
            raise ConfigError(
                "reference must be an .npz of ADM's suite or a folder of real images for FID, "
                f"got {self.reference}",
                "reference",
            )

    @property
    def score(self) -> str:
        """The name of the score."""
        return TOKENIZER_DISTANCE if self.inception is None else FID


@dataclass(frozen=True)
class Row:
    """One line of the table, as text; the lower the value of the score, the better."""

    checkpoint: str
    dtype: str
    seed: str
    num_images: str
    solver: str
    guidance_schedule: str
    guidance_scale: str
    head_steps: str
    reference: str
    score: str
    value: str = ""


class Table:
    """Rows in a CSV file, which is written after each new row."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = local(path)
        self._columns = list(Row.__dataclass_fields__)
        self.rows: list[Row] = []
        if self._path.exists():
            readers.check_file(path)
            try:
                reader = csv.DictReader(io.StringIO(self._path.read_text()))
                known = reader.fieldnames == self._columns
                self.rows = [Row(**row) for row in reader] if known else []
                [float(row.value) for row in self.rows]
            except (OSError, ValueError, TypeError, csv.Error):
                known = False
            if not known:
                raise FileError(
                    f"{self._path} exists and is not the table of a sweep; "
                    "remove it or choose another file",
                    self._path,
                )

    def find(self, row: Row) -> float | None:
        """The score of a row without a value, if it is in the table."""
        same = (other for other in self.rows if replace(other, value="") == row)
        return next((float(other.value) for other in same), None)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, self.rows))
        with replace_file(self._path) as temporary:
            temporary.write_text(text.getvalue())


def load_model(setting: Setting) -> ClassConditionalPipeline:
    """The class-conditional model of a setting.

    Raises:
      FileError: it is another kind of model.
    """
    mark = fingerprint(setting.checkpoint)
    mesh = MeshConfig(data=-1)
    model = ClassConditionalPipeline.load(setting.checkpoint, dtype=setting.dtype, mesh=mesh)
    check_unchanged(setting.checkpoint, mark)
    return model


def sweep(
    setting: Setting,
    model: ClassConditionalPipeline,
    table: Table,
    *,
    scales: list[float],
    head_steps: list[int],
) -> tuple[list[SamplerConfig], list[float]]:
    """The samplers of all pairs, and their scores: from the table, or computed and added to it.

    Args:
      scales: guidance scales; none: the model's.
      head_steps: numbers of steps; none: the model's.
    """
    pairs = itertools.product(
        head_steps or [model.sampler.head_steps], scales or [model.sampler.guidance_scale]
    )
    samplers = [
        replace(model.sampler, head_steps=count, guidance_scale=scale) for count, scale in pairs
    ]
    rows = [_row(setting, sampler) for sampler in samplers]
    missing = any(table.find(row) is None for row in rows)
    scorer = Scorer(setting, model) if missing else None
    scores = []
    for sampler, row in zip(samplers, rows, strict=True):
        value = table.find(row)
        if value is None:
            assert scorer is not None
            value = scorer(sampler)
            table.add(replace(row, value=repr(value)))
        scores.append(value)
        print(f"{_title(sampler)}: {row.score} {value:.4g}", flush=True)
    return samplers, scores


class Scorer:
    """The score of the images that a sampler generates; the real images are read only once."""

    def __init__(self, setting: Setting, model: ClassConditionalPipeline) -> None:
        self._count = setting.num_images
        self._seed = setting.seed
        self._model = model
        self._batch_size = min(setting.batch_size, setting.num_images) * model.mesh.size
        make = _tokenizer_features if setting.inception is None else _inception_features
        self._extractor, self._reference = make(setting, model, self._batch_size)

    def __call__(self, sampler: SamplerConfig) -> float:
        features = RunningGaussian()
        labels = balanced_labels(0, self._count, self._model.config.num_classes)
        options: Any = {"sampler": sampler, "batch_size": self._batch_size}
        batches = self._model.batches(labels, self._seed, **options)
        with Progress(self._count, "image", _title(sampler)) as bar:
            for images in batches:
                features.add(np.asarray(self._extractor(images).pooled))
                bar.advance(len(images))
        return frechet_distance(features.result(), self._reference)


def _inception_features(
    setting: Setting, model: ClassConditionalPipeline, batch_size: int
) -> tuple[Extractor, Gaussian]:
    """Inception-v3, and the reference's Gaussian of its pooled features."""
    assert setting.inception is not None
    if setting.num_images <= inception.POOLED:
        print(
            f"warning: the covariance of {setting.num_images} images in {inception.POOLED} "
            "dimensions is singular: FID is far too large",
            file=sys.stderr,
        )
    real = Reference(setting.reference, (model.config.image_size, model.config.image_size))
    extractor = Extractor(inception.features, inception_weights.load(setting.inception), batch_size)
    return extractor, real.features(extractor).pooled


def _tokenizer_features(
    setting: Setting, model: ClassConditionalPipeline, batch_size: int
) -> tuple[Extractor, Gaussian]:
    """The mean and standard deviation over an image of each of the K values before the sign.

    And the Gaussian of these features of the real images.
    """
    print(
        f"note: without Inception weights the score is the {TOKENIZER_DISTANCE}; "
        "it only compares settings of this model",
        file=sys.stderr,
    )
    size = model.config.image_size
    if setting.reference == EMBEDDED:
        images: Images = ArrayImages(emoji_images("train", size))
    else:
        images = FolderImages(setting.reference, size)
    encoder = Autoencoder(model.tokenizer.config)

    def network(params: Any, images: UInt8[Array, "B H W 3"]) -> Features:
        z: Any = encoder.apply({"params": params}, image_files.to_model(images), method="encode")
        return Features(jnp.concatenate([z.mean((1, 2)), z.std((1, 2))], axis=-1))

    extractor = Extractor(network, model.tokenizer.params, batch_size)
    return extractor, collect(extractor.stream(images, "reference")).pooled


def plot_scores(
    path: Path, setting: Setting, samplers: list[SamplerConfig], scores: list[float]
) -> None:
    by_scale: dict[str, list[tuple[float, float]]] = {}
    by_steps: dict[str, list[tuple[float, float]]] = {}
    for sampler, value in zip(samplers, scores, strict=True):
        by_scale.setdefault(f"{sampler.head_steps} head steps", []).append(
            (sampler.guidance_scale, value)
        )
        by_steps.setdefault(f"guidance scale {sampler.guidance_scale:g}", []).append(
            (float(sampler.head_steps), value)
        )
    title = f"{setting.score}, {setting.num_images} images each"
    panels = [
        plot.Panel(
            name,
            lines,
            setting.score,
            tuple(sorted({x for line in lines.values() for x, _ in line})),
        )
        for name, lines in (("guidance scale", by_scale), ("head steps", by_steps))
    ]
    image_files.save_png(path, plot.line_charts(title, panels, columns=2, same_y=True))


def _title(sampler: SamplerConfig) -> str:
    return f"guidance {sampler.guidance_scale:g}, {sampler.head_steps} head steps"


def _row(setting: Setting, sampler: SamplerConfig) -> Row:
    return Row(
        checkpoint=fingerprint(setting.checkpoint),
        dtype=setting.dtype,
        seed=str(setting.seed),
        num_images=str(setting.num_images),
        solver=sampler.solver,
        guidance_schedule=sampler.guidance_schedule,
        guidance_scale=repr(float(sampler.guidance_scale)),
        head_steps=str(sampler.head_steps),
        reference=setting.reference,
        score=setting.score,
    )
