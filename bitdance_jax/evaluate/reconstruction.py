"""How well a tokenizer keeps images: PSNR, SSIM, rFID."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import UInt8

from bitdance_jax.errors import ConfigError
from bitdance_jax.evaluate.features import Extractor
from bitdance_jax.evaluate.fid import frechet_distance
from bitdance_jax.evaluate.images import Images
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.evaluate.ssim import ssim
from bitdance_jax.evaluate.statistics import RunningGaussian
from bitdance_jax.io.progress import Progress
from bitdance_jax.pipelines.tokenizer import Tokenizer


@dataclass(frozen=True)
class ReconstructionScores:
    """Attributes:
    psnr: mean over the images, in dB, peak 255.
    ssim: mean over the images, Gaussian window.
    rfid: Fréchet distance of Inception features between originals and reconstructions; None without a feature network.
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
    """Attributes:
    scores: over all images.
    pairs: the first images, each followed by its reconstruction.
    count: how many images there were, damaged ones left out.
    """

    scores: ReconstructionScores
    pairs: UInt8[np.ndarray, "N H W 3"]
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
    """Encodes and decodes every image that can be read, and compares.

    Args:
      tokenizer: its GAN decoder's noise, if it has any, is that of seed 0.
      images: with sides divisible by the tokenizer's downsampling.
      extractor: for the rFID, with batches of at least `batch_size`; None leaves it out.
      batch_size: images at a time.
      show: how many pairs to return.
      progress: show a bar.

    Raises:
      UserError: sides that are not divisible, or too few images for a covariance.
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
    psnrs, ssims, pairs = [], [], []
    originals, reconstructions = RunningGaussian(), RunningGaussian()
    seen = 0
    with Progress(len(images), "image", "reconstructing", shown=progress) as bar:
        for batch in images.batches(batch_size):
            # A short last batch is filled up, to keep one compiled shape.
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
