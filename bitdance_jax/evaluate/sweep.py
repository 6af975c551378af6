"""The score over guidance scale and head steps, with one loaded model: a table and a plot.

python -m bitdance_jax.evaluate.sweep --checkpoint MODEL --guidance 2.5,3.0,3.5 --head-steps 10,25,50 --num-images 10000 \
    --inception pt_inception-2015-12-05-6726825d.pth --reference VIRTUAL_imagenet256_labeled.npz
python -m bitdance_jax.evaluate.sweep --guidance 1,2,4 --head-steps 10,25 --num-images 500

The first is FID. The second, without --inception, is a demonstration: a Fréchet distance of features of the model's own tokenizer, which
compares settings of this one model and nothing else; table, plot and console say so.
"""

import csv
import io
import itertools
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from bitdance_jax.cli.command_line import Flags, parse, run
from bitdance_jax.config import SamplerConfig
from bitdance_jax.config.plain import BatchSize, PathName, Range
from bitdance_jax.data.sources import EmojiSource
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.errors import UserError
from bitdance_jax.evaluate import inception, weights
from bitdance_jax.evaluate.features import Extractor, Features
from bitdance_jax.evaluate.fid import frechet_distance
from bitdance_jax.evaluate.images import ArrayImages, FolderImages, Images
from bitdance_jax.evaluate.metrics import collect
from bitdance_jax.evaluate.reference import Reference
from bitdance_jax.evaluate.statistics import Gaussian, RunningGaussian
from bitdance_jax.io import image_files, plot, readers
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.io.model_lookup import EMBEDDED, check_unchanged, fingerprint
from bitdance_jax.io.progress import Progress
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline, load
from bitdance_jax.pipelines.data_parallel import DataParallelSampler
from bitdance_jax.tokenizer.autoencoder import Autoencoder


FID = "FID"
OWN = "distance of the tokenizer's own features (not ImageNet FID)"


@dataclass(frozen=True)
class Arguments(Flags):
    """Draws the same seed's images with every pair of guidance scale and head steps, and scores each against real images.

    Started again, it goes on: rows that the table has are not drawn anew. One process at a time writes a table.

    Attributes:
      checkpoint: model folder, local or gs://, or "emoji".
      guidance: scales with commas between them; the model's own if left out, like the next.
      head_steps: numbers of steps with commas between them.
      num_images: images of each pair, balanced over the classes.
      seed: of the images.
      inception: weights of the FID Inception-v3 (as for bitdance_jax.evaluate); without them, a demonstration on the model's own features.
      reference: what samples are compared with: with --inception as for bitdance_jax.evaluate, otherwise a folder of images; "emoji":
        the embedded training images.
      out: the table; the plot is beside it, with the ending .png.
      batch_size: images drawn at a time on each device.
      dtype: of weights and activations.
    """

    checkpoint: PathName = EMBEDDED
    guidance: str | None = None
    head_steps: str | None = None
    num_images: Annotated[int, Range(2, 10**8)] = 1000
    seed: int = 0
    inception: PathName | None = None
    reference: PathName = EMBEDDED
    out: PathName = "sweep.csv"
    batch_size: BatchSize = 24
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.out).suffix != ".csv":
            raise UserError(f"--out is a table and must end in .csv, got {self.out}")
        if self.inception is not None and self.reference == EMBEDDED:
            raise UserError(
                "--inception needs --reference, an .npz of ADM's suite or a folder of real images"
            )


@dataclass(frozen=True)
class Row:
    """One line of the table, all of it text: what was drawn, what it was compared with and how, and the score (lower is better)."""

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
    """Rows in a CSV file. Each new one is on the disk before the next is begun."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path, self._columns = Path(path), list(Row.__dataclass_fields__)
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
                raise UserError(
                    f"{self._path} is there already and no table of a sweep; remove it or give another --out"
                )

    def find(self, wanted: Row) -> float | None:
        """The score of a row that has none yet, if the table tells."""
        return next(
            (float(row.value) for row in self.rows if replace(row, value="") == wanted), None
        )

    def add(self, row: Row) -> None:
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, self.rows))
        with replace_file(self._path) as temporary:
            temporary.write_text(text.getvalue())


def main() -> int:
    arguments = parse(Arguments, prog="python -m bitdance_jax.evaluate.sweep")
    scales = _numbers(arguments.guidance, float, "--guidance", "2.5,3.0,3.5")
    steps = _numbers(arguments.head_steps, int, "--head-steps", "10,25,50")
    image = Path(arguments.out).with_suffix(".png")
    image_files.check_writable(image)
    with writer_lock(arguments.out, is_folder=False):
        table = Table(arguments.out)
        mark = fingerprint(arguments.checkpoint)
        model = load(arguments.checkpoint, jnp.dtype(arguments.dtype))
        check_unchanged(arguments.checkpoint, mark)
        if not isinstance(model, ClassConditionalPipeline):
            raise UserError(
                f"{arguments.checkpoint} is a tokenizer, which draws nothing by itself; give a class-conditional model"
            )
        pairs = itertools.product(
            steps or [model.sampler.head_steps], scales or [model.sampler.guidance_scale]
        )
        samplers = [
            replace(model.sampler, head_steps=count, guidance_scale=scale) for count, scale in pairs
        ]
        try:
            scores = sweep(arguments, model, samplers, table)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
        draw_plot(image, arguments, samplers, scores)
        best = samplers[int(np.argmin(scores))]
        print(
            f"lowest {_score_name(arguments)}: {min(scores):.4g} with guidance {best.guidance_scale:g} and {best.head_steps} head steps"
        )
        print(f"table in {arguments.out}, plot in {image}")
        return 0


def sweep(
    arguments: Arguments,
    model: ClassConditionalPipeline,
    samplers: list[SamplerConfig],
    table: Table,
) -> list[float]:
    """The score of every sampler, from the table or drawn and added to it."""
    rows = [_row(arguments, sampler) for sampler in samplers]
    missing = any(table.find(row) is None for row in rows)
    scorer = Scorer(arguments, model) if missing else None
    scores = []
    for sampler, row in zip(samplers, rows, strict=True):
        value = table.find(row)
        if value is None:
            assert scorer is not None
            value = scorer(sampler)
            table.add(replace(row, value=repr(value)))
        scores.append(value)
        print(
            f"guidance {sampler.guidance_scale:g}, {sampler.head_steps} head steps: {row.score} {value:.4g}",
            flush=True,
        )
    return scores


class Scorer:
    """Draws images with a sampler and compares them with real ones; model, feature network and the real features are there once."""

    def __init__(self, arguments: Arguments, model: ClassConditionalPipeline) -> None:
        self._count, self._seed = arguments.num_images, arguments.seed
        self._sampler = DataParallelSampler(model, min(arguments.batch_size, arguments.num_images))
        make = _own_features if arguments.inception is None else _inception_features
        self._extractor, self._reference = make(arguments, model, self._sampler.batch_size)

    def __call__(self, sampler: SamplerConfig) -> float:
        features = RunningGaussian()
        title = f"guidance {sampler.guidance_scale:g}, {sampler.head_steps} steps"
        with Progress(self._count, "image", title) as bar:
            for images in self._sampler.batches(self._seed, 0, self._count, sampler):
                features.add(np.asarray(self._extractor(images).pooled))
                bar.advance(len(images))
        return frechet_distance(features.result(), self._reference)


def _inception_features(
    arguments: Arguments, model: ClassConditionalPipeline, batch_size: int
) -> tuple[Extractor, Gaussian]:
    """Inception-v3, and the reference's Gaussian of its pooled features."""
    assert arguments.inception is not None
    if arguments.num_images <= inception.POOLED:
        print(
            f"warning: {arguments.num_images} images cannot fill {inception.POOLED} dimensions: FID is far too large",
            file=sys.stderr,
        )
    real = Reference(arguments.reference, (model.config.image_size, model.config.image_size))
    extractor = Extractor(inception.features, weights.load(arguments.inception), batch_size)
    return extractor, real.features(extractor).pooled


def _own_features(
    arguments: Arguments, model: ClassConditionalPipeline, batch_size: int
) -> tuple[Extractor, Gaussian]:
    """Mean and spread over an image of the tokenizer's values before the sign, 2 K features; and those of real images."""
    print(
        f"no --inception: the score is the {OWN}; it compares settings of this model only",
        file=sys.stderr,
    )
    size = model.config.image_size
    if arguments.reference == EMBEDDED:
        images: Images = ArrayImages(
            np.stack([centre_crop(image, size) for image in EmojiSource("train").arrays["image"]])
        )
    else:
        images = FolderImages(arguments.reference, size)
    encoder = Autoencoder(model.tokenizer.config)

    def network(params: Any, images: UInt8[Array, "B H W 3"]) -> Features:
        z: Any = encoder.apply({"params": params}, image_files.to_model(images), method="encode")
        return Features(jnp.concatenate([z.mean((1, 2)), z.std((1, 2))], axis=-1))

    extractor = Extractor(network, model.tokenizer.params, batch_size)
    return extractor, collect(extractor.stream(images, "reference")).pooled


def draw_plot(
    path: Path, arguments: Arguments, samplers: list[SamplerConfig], scores: list[float]
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
    title = f"{_score_name(arguments)}, {arguments.num_images} images each"
    score = _score_name(arguments)
    panels = [
        plot.Panel(
            name, lines, score, tuple(sorted({x for line in lines.values() for x, _ in line}))
        )
        for name, lines in (("guidance scale", by_scale), ("head steps", by_steps))
    ]
    image_files.save_png(path, plot.line_charts(title, panels, columns=2, same_y=True))


def _row(arguments: Arguments, sampler: SamplerConfig) -> Row:
    return Row(
        checkpoint=fingerprint(arguments.checkpoint),
        dtype=arguments.dtype,
        seed=str(arguments.seed),
        num_images=str(arguments.num_images),
        solver=sampler.solver,
        guidance_schedule=sampler.guidance_schedule,
        guidance_scale=repr(float(sampler.guidance_scale)),
        head_steps=str(sampler.head_steps),
        reference=arguments.reference,
        score=_score_name(arguments),
    )


def _score_name(arguments: Arguments) -> str:
    return OWN if arguments.inception is None else FID


def _numbers(text: str | None, kind: Any, flag: str, example: str) -> list[Any]:
    """The numbers of a list with commas, each once."""
    if text is None:
        return []
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError(
            f"{flag} takes numbers with commas between them, such as {example}, got {text!r}"
        )
    return list(dict.fromkeys(numbers))


if __name__ == "__main__":
    sys.exit(run(main))
