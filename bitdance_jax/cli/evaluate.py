"""Scores images, or a tokenizer.

python -m bitdance_jax.evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception pt_inception-2015-12-05-6726825d.pth
python -m bitdance_jax.evaluate --reconstruction emoji emoji
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import BatchSize, Config, ImageSide, PathName, Range
from bitdance_jax.data.listing import left_out_text
from bitdance_jax.data.sources import EmojiSource
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.errors import UserError
from bitdance_jax.evaluate import inception, metrics, weights
from bitdance_jax.evaluate.features import BATCH, Extractor
from bitdance_jax.evaluate.images import ArrayImages, FolderImages, Images, open_images
from bitdance_jax.evaluate.inception_score import inception_score
from bitdance_jax.evaluate.reconstruction import evaluate_tokenizer
from bitdance_jax.evaluate.reference import Reference
from bitdance_jax.io import image_files
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.io.paths import check_suffix
from bitdance_jax.pipelines.class_conditional import Tokenizer, load


PAIRS_A_ROW = 4

SORTED = 0.9
"""Share of an Inception Score that is left where the samples' order is one of their classes; by chance it moves by a hundredth."""


@dataclass(frozen=True)
class Arguments(Config):
    """FID, sFID, Inception Score, precision and recall by the rules of ADM's suite; or PSNR, SSIM and rFID of a tokenizer.

    Attributes:
      images: an .npz with uint8 images in arr_0, or a folder; with --reconstruction also "emoji", the held-out ones.
      reference: an .npz of ADM's suite (mu, sigma, mu_s, sigma_s, arr_0) or a folder of real images, centre-cropped to the samples' size.
      inception: the published weights of the FID Inception-v3, pt_inception-2015-12-05-6726825d.pth, or the same tensors in a .safetensors.
      reconstruction: a model folder, or "emoji": encode and decode the images with its tokenizer.
      image_size: crop the images of a folder to squares of this side; left out, a class-conditional model's, or they must have one size.
      batch_size: images at a time, over all devices.
      out: with --reconstruction, a PNG of originals beside reconstructions.
      show: how many of them.
    """

    images: Annotated[PathName, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    reference: PathName | None = None
    inception: PathName | None = None
    reconstruction: PathName | None = None
    image_size: ImageSide | None = None
    batch_size: BatchSize = BATCH
    out: PathName | None = None
    show: Annotated[int, Range(1, 10_000)] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_suffix(self.out, ".png", "out")


def main() -> None:
    arguments = parse(Arguments)
    if arguments.reconstruction:
        _reconstruction(arguments, arguments.reconstruction)
    else:
        _samples(arguments)


def _samples(arguments: Arguments) -> None:
    if arguments.reference is None:
        raise UserError(
            "give --reference, an .npz of ADM's suite or a folder of real images (or --reconstruction for a tokenizer)"
        )
    if arguments.inception is None:
        raise UserError(
            f"give --inception, the weights of the FID Inception-v3: {weights.PUBLISHED}"
        )
    if arguments.out is not None:
        raise UserError("--out goes with --reconstruction")
    samples = open_images(arguments.images, arguments.image_size)
    reference = Reference(arguments.reference, samples.size)
    extractor = _inception(arguments.inception, min(arguments.batch_size, len(samples)))
    _describe(arguments.images, samples)
    sample_features = metrics.collect(extractor.stream(samples, "samples"))
    reference_features = reference.features(extractor)
    for name, features in (
        ("samples", sample_features),
        ("reference images", reference_features),
    ):
        _warn_of_rank(features.pooled.count, name, "FID and sFID")
    _say_damaged(samples)
    for missing in reference.missing:
        print(f"note: {missing}", file=sys.stderr)
    scores = metrics.score(sample_features, reference_features, progress=True)
    _warn_of_order(sample_features, scores)
    print(scores)


def _reconstruction(arguments: Arguments, model: str) -> None:
    if arguments.reference is not None:
        raise UserError(
            "--reference does not go with --reconstruction, which compares the images with themselves"
        )
    if arguments.out is not None:
        image_files.check_writable(arguments.out)
    loaded = load(model)
    tokenizer, size = (
        (loaded, None)
        if isinstance(loaded, Tokenizer)
        else (loaded.tokenizer, loaded.config.image_size)
    )
    images = _open(arguments.images, arguments.image_size or size)
    batch_size = min(arguments.batch_size, len(images))
    extractor = _inception(arguments.inception, batch_size) if arguments.inception else None
    _describe(arguments.images, images)
    result = evaluate_tokenizer(
        tokenizer, images, extractor, batch_size=batch_size, show=arguments.show
    )
    if extractor:
        _warn_of_rank(result.count, "images", "rFID")
    _say_damaged(images)
    print(result.scores)
    if arguments.out is not None:
        enlarge = max(1, 128 // max(images.size))
        image_files.save_png(
            arguments.out, image_files.grid(result.pairs, columns=2 * PAIRS_A_ROW, enlarge=enlarge)
        )
        print(
            f"originals beside reconstructions of {len(result.pairs) // 2} images in {arguments.out}"
        )


def _open(path: str, size: int | None) -> Images:
    if path != EMBEDDED or Path(path).exists():
        return open_images(path, size)
    emoji = EmojiSource("heldout").arrays["image"]
    return ArrayImages(
        emoji if size is None else np.stack([centre_crop(image, size) for image in emoji])
    )


def _describe(path: str, images: Images) -> None:
    """How many images there are, and what else lies in their folder."""
    others = f"; {left_out_text(images.left_out)}" if isinstance(images, FolderImages) else ""
    print(f"{path}: {len(images):,} images{others.removesuffix('; ')}", file=sys.stderr)


def _say_damaged(images: Images) -> None:
    if isinstance(images, FolderImages) and images.damaged:
        whole = len(images) - len(images.damaged)
        print(
            f"note: {len(images.damaged):,} damaged images are left out; the scores are those of {whole:,}",
            file=sys.stderr,
        )


def _inception(path: str, batch_size: int) -> Extractor:
    return Extractor(inception.features, weights.load(path), batch_size)


def _warn_of_order(samples: metrics.FeatureSet, scores: metrics.Scores) -> None:
    """Samples sorted by class, whose Inception Score by ADM's rule, splits of the file's own order, is another."""
    if samples.logits is None or scores.inception_score is None:
        return
    in_order = inception_score(samples.logits)
    if in_order < SORTED * scores.inception_score:
        print(
            f"warning: the samples are sorted by class: in that order, which ADM's suite keeps, their Inception Score is {in_order:.4f}; "
            "the one below is of an order drawn at random",
            file=sys.stderr,
        )


def _warn_of_rank(count: int | None, name: str, scores: str) -> None:
    """Too few features for a covariance of full rank (None: a file that does not say how many it is from)."""
    if count is not None and count <= inception.POOLED:
        print(
            f"warning: {count} {name} cannot fill the features' {inception.POOLED} dimensions: their covariance is singular, and {scores} "
            "too large; published figures are from 50,000",
            file=sys.stderr,
        )
