"""Reconstruction quality of a tokenizer: PSNR, SSIM and rFID."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import UInt8

from bitdance_jax.errors import ConfigError
from bitdance_jax.evaluate.features import Extractor
from bitdance_jax.evaluate.images import Images
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.fid.frechet import frechet_distance
from bitdance_jax.fid.statistics import RunningGaussian
from bitdance_jax.io.progress import Progress
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.tokenizer.ssim import ssim


@dataclass(frozen=True)
class ReconstructionScores:
    """The scores of a tokenizer.

    Attributes:
      psnr: mean over the images, in dB, peak 255.
      ssim: mean over the images, with a Gaussian window.
      rfid: Fréchet distance of Inception features between originals and reconstructions; None
        without a feature network.
    """

    psnr: float
    ssim: float
    rfid: float | None = None

    def __str__(self) -> str:
        rows = {"PSNR": self.psnr, "SSIM": self.ssim, "rFID": self.rfid}
        return "\n".join(
            f"{name}: {value:.4f}" for name, value in rows.items() if value is not None
        )


@dataclass(frozen=True)
class Reconstruction:
    """The result of an evaluation.

    Attributes:
      scores: over all images.
      pairs: the first images, each followed by its reconstruction.
      count: number of images, without damaged ones.
    """

    scores: ReconstructionScores
    pairs: UInt8[np.ndarray, "B H W 3"]
    count: int


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    images: Images,
    extractor: Extractor | None,
    *,
    batch_size: int,
    show: int,
    progress: bool = True,
) -> Reconstruction:
    """Encodes and decodes all images, and compares them with the originals.

    Args:
      tokenizer: the noise of a GAN decoder is that of seed 0.
      images: with sides divisible by the tokenizer's downsampling; damaged ones are skipped.
      extractor: for rFID, with batches of at least `batch_size`; None: no rFID.
      batch_size: images at a time.
      show: number of pairs to return.
      progress: show a progress bar.

    Raises:
      ConfigError: sides that are not divisible.
      UserError: too few images for a covariance.
    """
    down = tokenizer.config.downsampling
    if any(side % down for side in images.size):
        height, width = images.size
        raise ConfigError(
            f"the tokenizer needs sides divisible by {down}, and the images are {height} x {width};"
            " set image_size",
            "image_size",
        )
    similarity = jax.jit(ssim)
    psnrs = []
    ssims = []
    pairs = []
    originals = RunningGaussian()
    reconstructions = RunningGaussian()
    seen = 0
    with Progress(len(images), "image", "reconstructing", shown=progress) as bar:
        for batch in images.batches(batch_size):
            # A smaller last batch is padded, so that one shape is compiled.
            full = batch[np.minimum(np.arange(batch_size), len(batch) - 1)]
            decoded = tokenizer.decode(tokenizer.encode(full), first_index=seen)
            ssims.append(np.asarray(similarity(decoded, full))[: len(batch)])
            decoded = decoded[: len(batch)]
            psnrs.append(psnr(decoded, batch))
            if extractor:
                originals.add(np.asarray(extractor(batch).pooled))
                reconstructions.add(np.asarray(extractor(decoded).pooled))
            if seen < show:
                pairs.append(np.stack([batch, decoded], axis=1)[: show - seen])
            seen += len(batch)
            bar.advance(len(batch))
    rfid = frechet_distance(reconstructions.result(), originals.result()) if extractor else None
    scores = ReconstructionScores(
        float(np.concatenate(psnrs).mean()), float(np.concatenate(ssims).mean()), rfid
    )
    return Reconstruction(scores, np.concatenate(np.concatenate(pairs)), seen)
