r"""`bitdance evaluate`: scores of generated images, or of a tokenizer.

    bitdance evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz \
        --inception pt_inception-2015-12-05-6726825d.pth
    bitdance evaluate --reconstruction emoji emoji
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import BatchSize, Config, ImageSide, PathName, Range
from bitdance_jax.data.emoji import SIDE, emoji_images
from bitdance_jax.data.listing import describe_skipped
from bitdance_jax.errors import ConfigError
from bitdance_jax.evaluate import metrics
from bitdance_jax.evaluate.features import BATCH, Extractor
from bitdance_jax.evaluate.images import ArrayImages, FolderImages, Images, open_images
from bitdance_jax.evaluate.inception_score import inception_score
from bitdance_jax.evaluate.reconstruction import evaluate_tokenizer
from bitdance_jax.evaluate.reference import Reference
from bitdance_jax.fid import inception, inception_weights
from bitdance_jax.io import image_files, model_lookup
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.io.paths import check_suffix
from bitdance_jax.io.progress import report
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.pipelines.tokenizer import Tokenizer


PAIRS_PER_ROW = 4

SORTED = 0.9
"""If the Inception Score in the order of the samples is below this share of the score in random
order, the samples are sorted by class; otherwise the two differ by about a hundredth."""


@dataclass(frozen=True)
class Arguments(Config):
    """FID, sFID, Inception Score, precision and recall as in ADM's suite; or PSNR, SSIM and rFID.

    Attributes:
      images: an .npz with uint8 images in arr_0, or a folder; with --reconstruction also "emoji",
        the held-out ones.
      reference: an .npz of ADM's suite (mu, sigma, mu_s, sigma_s, arr_0), or a folder of real
        images, which are centre-cropped to the size of the samples.
      inception: the published weights of the FID Inception-v3,
        pt_inception-2015-12-05-6726825d.pth, or the same tensors in a .safetensors.
      reconstruction: a model folder, "emoji" or a Hugging Face id: encode and decode the images
        with its tokenizer.
      image_size: crop the images of a folder to squares of this side; default: the size of a
        class-conditional model, otherwise all images must have the same size.
      batch_size: images at a time, over all devices.
      out: with --reconstruction, a PNG of originals beside reconstructions.
      show: number of images in it.
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
    keep_compiled()
    if arguments.reconstruction:
        _evaluate_tokenizer(arguments, arguments.reconstruction)
    else:
        _evaluate_samples(arguments)


def _evaluate_samples(arguments: Arguments) -> None:
    if arguments.reference is None:
        raise ConfigError(
            "reference is missing: an .npz of ADM's suite or a folder of real images "
            "(or --reconstruction for a tokenizer)",
            "reference",
        )
    if arguments.inception is None:
        raise ConfigError(
            "inception is missing: the weights of the FID Inception-v3, "
            f"{inception_weights.PUBLISHED}",
            "inception",
        )
    if arguments.out is not None:
        raise ConfigError("out needs --reconstruction", "out")
    samples = open_images(arguments.images, arguments.image_size)
    reference = Reference(arguments.reference, samples.size)
    extractor = _inception(arguments.inception, min(arguments.batch_size, len(samples)))
    _report_images(arguments.images, samples)
    sample_features = metrics.collect(extractor.stream(samples, "samples"))
    reference_features = reference.features(extractor)
    names = {"samples": sample_features, "reference images": reference_features}
    for name, features in names.items():
        _warn_of_rank(features.pooled.count, name, "FID and sFID")
    _report_damaged(samples)
    for missing in reference.missing:
        print(f"note: {missing}", file=sys.stderr)
    report("computing the scores")
    scores = metrics.score(sample_features, reference_features, progress=True)
    _warn_of_order(sample_features, scores)
    print(scores)


def _evaluate_tokenizer(arguments: Arguments, model: str) -> None:
    if arguments.reference is not None:
        raise ConfigError(
            "reference cannot be used with --reconstruction, which compares with the images",
            "reference",
        )
    if arguments.out is not None:
        image_files.check_writable(arguments.out)
    model = local_folder(model)
    size = model_lookup.read_config(model).config.get("image_size")
    tokenizer = Tokenizer.load(model)
    images = _open(arguments.images, arguments.image_size or size)
    batch_size = min(arguments.batch_size, len(images))
    extractor = _inception(arguments.inception, batch_size) if arguments.inception else None
    _report_images(arguments.images, images)
    result = evaluate_tokenizer(
        tokenizer, images, extractor, batch_size=batch_size, show=arguments.show
    )
    if extractor:
        _warn_of_rank(result.count, "images", "rFID")
    _report_damaged(images)
    print(result.scores)
    if arguments.out is not None:
        enlarge = max(1, 128 // max(images.size))
        grid = image_files.grid(result.pairs, columns=2 * PAIRS_PER_ROW, enlarge=enlarge)
        image_files.save_png(arguments.out, grid)
        count = len(result.pairs) // 2
        print(f"originals beside reconstructions of {count} images in {arguments.out}")


def _open(path: str, size: int | None) -> Images:
    if path != EMBEDDED or Path(path).exists():
        return open_images(path, size)
    return ArrayImages(emoji_images("heldout", size or SIDE))


def _report_images(path: str, images: Images) -> None:
    """Prints the number of images, and of the other files in their folder."""
    others = f"; {describe_skipped(images.skipped)}" if isinstance(images, FolderImages) else ""
    print(f"{path}: {len(images):,} images{others.removesuffix('; ')}", file=sys.stderr)


def _report_damaged(images: Images) -> None:
    if isinstance(images, FolderImages) and images.damaged:
        print(
            f"note: {len(images.damaged):,} damaged images are skipped; the scores are of the "
            f"other {len(images) - len(images.damaged):,}",
            file=sys.stderr,
        )


def _inception(path: str, batch_size: int) -> Extractor:
    return Extractor(inception.features, inception_weights.load(path), batch_size)


def _warn_of_order(samples: metrics.FeatureSet, scores: metrics.Scores) -> None:
    """Warns if the samples are sorted by class, because ADM's suite splits them in their order."""
    if samples.logits is None or scores.inception_score is None:
        return
    in_order = inception_score(samples.logits)
    if in_order < SORTED * scores.inception_score:
        print(
            "warning: the samples are sorted by class. ADM's suite, which keeps their order, would "
            f"report an Inception Score of {in_order:.4f}; the one below is in random order",
            file=sys.stderr,
        )


def _warn_of_rank(count: int | None, name: str, scores: str) -> None:
    """Warns of too few features for a covariance of full rank; None: their number is unknown."""
    if count is not None and count <= inception.POOLED:
        print(
            f"warning: the covariance of {count} {name} in {inception.POOLED} dimensions is "
            f"singular, and {scores} too large; published results are from 50,000",
            file=sys.stderr,
        )
