"""Compares tokenizers on held-out images: a table, and reconstructions side by side.

    pip install "bitdance_jax[perceptual]"
    python benchmarks/compare_tokenizers.py --models runs/emoji_tokenizer_plain/model \
        runs/emoji_tokenizer/model --names plain full

Writes `tokenizers.json` and `tokenizers.md` (PSNR, SSIM, distance in the features of
EfficientNet-Lite0; of all held-out images) and `tokenizers.png` (originals in the first row, then a
row for each tokenizer).
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

import bitdance_jax
from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import BatchSize, Config, Count, ImageSide, PathName, require
from bitdance_jax.convert.perceptual import load_efficientnet
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.emoji import emoji_images
from bitdance_jax.data.loader import make_loader
from bitdance_jax.evaluate.psnr import psnr
from bitdance_jax.io import image_files
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.tokenizer import efficientnet
from bitdance_jax.tokenizer.ssim import ssim


@dataclass(frozen=True)
class Arguments(Config):
    """Compares tokenizers.

    Attributes:
      models: model folders.
      names: of the models; default: their folders.
      data: tar files of WebDataset, a folder of images, or "emoji", the embedded ones.
      held_out_field: of the tar files' samples, as `DataConfig.held_out_field`; by default every
        19th image or fewer is held out, as in training.
      image_size: pixels along a side; the images are centre-cropped.
      batch_size: images at a time.
      columns: images in the figure.
      perceptual_weights: file of EfficientNet-Lite0; default: that of the installed package.
      out: folder of the results.
    """

    models: tuple[PathName, ...]
    data: PathName = EMBEDDED
    held_out_field: str | None = None
    names: tuple[str, ...] = ()
    image_size: ImageSide = 128
    batch_size: BatchSize = 32
    columns: Count = 10
    perceptual_weights: PathName | None = None
    out: PathName = "."

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.names) in (0, len(self.models)),
            f"names must be as many as models, got {len(self.names)} and {len(self.models)}",
            "names",
        )


@dataclass(frozen=True)
class Scores:
    """Means over the held-out images.

    Attributes:
      name: of the tokenizer.
      psnr: dB, peak 255.
      ssim: with a Gaussian window.
      lite0_distance: `efficientnet.distance`.
      bits_per_pixel: of the codes.
      parameters: number of weights.
    """

    name: str
    psnr: float
    ssim: float
    lite0_distance: float
    bits_per_pixel: float
    parameters: int


def held_out(arguments: Arguments) -> UInt8[np.ndarray, "N H W 3"]:
    """The images that training with this data holds out."""
    if arguments.data == EMBEDDED:
        return emoji_images("heldout", arguments.image_size)
    is_folder = os.path.isdir(arguments.data)
    data = DataConfig(
        source="images" if is_folder else "webdataset",
        path=arguments.data,
        held_out_field=arguments.held_out_field,
    )
    batches = make_loader(
        data.open_split("heldout"),
        batch_size=arguments.batch_size,
        seed=0,
        image_size=arguments.image_size,
        shuffle=False,
        repeat=False,
    )
    return np.concatenate([batch["image"] for batch in batches])


def reconstruct(
    tokenizer: bitdance_jax.Tokenizer, images: UInt8[np.ndarray, "N H W 3"], batch_size: int
) -> UInt8[np.ndarray, "N H W 3"]:
    """The images after the tokenizer; the noise of a GAN decoder is that of seed 0."""
    parts = []
    for first in tqdm(range(0, len(images), batch_size), desc="reconstructing", unit="batch"):
        rows = np.minimum(np.arange(first, first + batch_size), len(images) - 1)  # one shape
        parts.append(tokenizer.decode(tokenizer.encode(images[rows]), first_index=first))
    return np.concatenate(parts)[: len(images)]


def score(
    name: str,
    tokenizer: bitdance_jax.Tokenizer,
    images: UInt8[np.ndarray, "N H W 3"],
    reconstructions: UInt8[np.ndarray, "N H W 3"],
    weights: Any,
) -> Scores:
    distance = jax.jit(efficientnet.distance)
    pairs = list(zip(images, reconstructions, strict=True))
    to_model = image_files.to_model
    distances = [distance(weights, to_model(b[None]), to_model(a[None])) for a, b in pairs]
    similarity = jax.jit(ssim)
    config = tokenizer.config
    return Scores(
        name,
        psnr=float(psnr(reconstructions, images).mean()),
        ssim=float(np.mean([similarity(b[None], a[None]) for a, b in pairs])),
        lite0_distance=float(np.mean(distances)),
        bits_per_pixel=config.bits / config.downsampling**2,
        parameters=sum(x.size for x in jax.tree.leaves(tokenizer.params)),
    )


def table(rows: list[Scores], count: int) -> str:
    """The scores in Markdown."""
    lines = [
        f"Means over {count} held-out images.",
        "",
        "| tokenizer | parameters | bits a pixel | PSNR, dB | SSIM | Lite0 distance |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.parameters / 1e6:.2f}M | {row.bits_per_pixel:g} | {row.psnr:.2f} | "
        f"{row.ssim:.3f} | {row.lite0_distance:.4f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parse(Arguments)
    weights = load_efficientnet(arguments.perceptual_weights)
    images = held_out(arguments)
    names = arguments.names or arguments.models
    rows = []
    shown = np.linspace(0, len(images) - 1, min(arguments.columns, len(images))).astype(int)
    figure = [images[shown]]
    for name, folder in zip(names, arguments.models, strict=True):
        tokenizer = bitdance_jax.Tokenizer.load(folder)
        reconstructions = reconstruct(tokenizer, images, arguments.batch_size)
        rows.append(score(name, tokenizer, images, reconstructions, weights))
        figure.append(reconstructions[shown])
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    grid = image_files.grid(np.concatenate(figure), len(shown), ["original", *names])
    image_files.save_png(out / "tokenizers.png", grid)
    text = table(rows, len(images))
    with replace_file(out / "tokenizers.md") as path:
        path.write_text(text)
    with replace_file(out / "tokenizers.json") as path:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(run(main))
