"""Completes held-out images of any model: how near is the inside of a hole to what was there?

    pip install "bitdance_jax[perceptual]"
    python benchmarks/holes.py --model runs/mine/model --data.source folder --data.path images
    python benchmarks/holes.py --model emoji --captioned emoji    # embedded model and images

Beside the completed images stand images of the same label or prompt with nothing kept, which a
completion should beat; the images after the tokenizer, which bound it; and completions of the
mirrored images, mirrored back, where the model sees what is right of the hole in place of what is
left of it. Inside of the hole it measures PSNR and the share of equal bits, and of the image with
its own pixels around the hole the distance in the features of EfficientNet-Lite0. Writes
`holes.json` and `holes.png`.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from held_out_captions import evenly, read
from jaxtyping import Bool, UInt8

import bitdance_jax
from bitdance_jax import Given
from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import BatchSize, Config, Count, PathName, Seed
from bitdance_jax.convert.perceptual import load_efficientnet
from bitdance_jax.data.captioned_config import CaptionedDataConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.loader import make_loader
from bitdance_jax.errors import UserError
from bitdance_jax.io import image_files
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.tokenizer import efficientnet


COLUMNS = 10
"""Images in the figure."""


@dataclass(frozen=True)
class Arguments(Config):
    """Measures completions of held-out images.

    Attributes:
      model: a model folder or a Hugging Face id.
      data: the held-out images of a class-conditional model.
      captioned: those of a text-to-image model: captioned images of one size; a field "split" tells
        which are held out.
      images: at most this many, spread evenly.
      head_steps: of the solver; default: the model's.
      guidance_scale: default: the model's.
      seed: of the samples.
      batch_size: images that are sampled at a time.
      out: folder of the two files.
    """

    model: PathName
    data: DataConfig = field(default_factory=DataConfig)
    captioned: PathName | None = None
    images: Count = 100
    head_steps: Count | None = None
    guidance_scale: float | None = None
    seed: Seed = 0
    batch_size: BatchSize = 32
    out: PathName = "."


def held_out(
    arguments: Arguments, pipeline: bitdance_jax.Pipeline
) -> tuple[UInt8[np.ndarray, "N H W 3"], list[Any]]:
    """Images with their labels or captions."""
    if arguments.captioned is not None:
        config = CaptionedDataConfig(paths=(arguments.captioned,), held_out_field="split")
        images, inputs = read(config.open_splits()[1])
    else:
        source = arguments.data.open_split("heldout")
        if tuple(source.class_names) != pipeline.class_names:
            raise UserError(
                f"the data has {len(source.class_names)} classes, such as {source.class_names[0]}, "
                f"and the model others, such as {pipeline.class_names[0]}"
            )
        loader = make_loader(
            source,
            batch_size=arguments.batch_size,
            seed=0,
            image_size=pipeline.default_size[0],
            shuffle=False,
            repeat=False,
        )
        batches = list(loader)
        images = np.concatenate([batch["image"] for batch in batches])
        inputs = np.concatenate([batch["label"] for batch in batches]).tolist()
    rows = evenly(len(images), arguments.images)
    return images[rows], [inputs[row] for row in rows]


def holes(height: int, width: int, patch: int, seed: int) -> dict[str, Bool[np.ndarray, "H W"]]:
    """Masks of whole patches of `patch` pixels, True inside."""
    rows, columns = height // patch, width // patch
    y, x = np.indices((rows, columns))
    edge_y, edge_x = max(1, rows // 4), max(1, columns // 4)
    inside_y = (y >= edge_y) & (y < rows - edge_y)
    masks = {
        "centre": inside_y & (x >= edge_x) & (x < columns - edge_x),
        "left half": x < columns // 2,
        "right half": x >= columns // 2,
        "lower half": y >= rows // 2,
        "random half": np.random.default_rng(seed).random((rows, columns)) < 0.5,
    }
    return {name: mask.repeat(patch, 0).repeat(patch, 1) for name, mask in masks.items()}


class Scorer:
    """Distances of images to the originals inside of a hole."""

    def __init__(self, pipeline: bitdance_jax.Pipeline, images: UInt8[np.ndarray, "N H W 3"]):
        self._tokenizer = pipeline.tokenizer
        self._images = images
        self._codes = self._tokenizer.encode(images)
        weights = load_efficientnet()
        to_model = image_files.to_model
        self._distance = jax.jit(
            lambda a, b: efficientnet.distance(weights, to_model(a[None]), to_model(b[None]))
        )

    def __call__(
        self, images: UInt8[np.ndarray, "N H W 3"], hole: Bool[np.ndarray, "H W"]
    ) -> dict[str, float]:
        pasted = np.where(hole[..., None], images, self._images)
        error = np.square(images[:, hole].astype(float) - self._images[:, hole]).mean(axis=(1, 2))
        down = self._tokenizer.config.downsampling
        bits = self._tokenizer.encode(pasted) == self._codes
        distances = [self._distance(a, b) for a, b in zip(pasted, self._images, strict=True)]
        return {
            "psnr": float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-6)))),
            "equal_bits": float(bits[:, hole[::down, ::down]].mean()),
            "lite0_distance": float(np.mean(distances)),
        }


def main() -> None:
    arguments = parse(Arguments)
    pipeline = bitdance_jax.load(arguments.model)
    images, inputs = held_out(arguments, pipeline)
    height, width = images.shape[1:3]
    changes = {
        name: value
        for name in ("head_steps", "guidance_scale")
        if (value := getattr(arguments, name)) is not None
    }
    options: dict[str, Any] = {
        "sampler": dataclasses.replace(pipeline.sampler, **changes),
        "batch_size": arguments.batch_size,
    }
    if arguments.captioned is not None:
        options["size"] = (height, width)

    def complete(images: np.ndarray, hole: np.ndarray) -> np.ndarray:
        given = [Given(image, hole) for image in images]
        return pipeline.sample(inputs, arguments.seed, given=given, **options)

    score = Scorer(pipeline, images)
    patch = pipeline.config.tokenizer.downsampling * pipeline.config.patch_side
    nothing_kept = pipeline.sample(inputs, arguments.seed, **options)
    reconstructed = pipeline.tokenizer.decode(pipeline.tokenizer.encode(images))
    report: dict[str, Any] = {"images": len(images), "model": arguments.model}
    figure = [images]
    captions = ["original"]
    print(f"{'hole':14}{'images':18}PSNR, dB  equal bits  Lite0 distance")
    for name, hole in holes(height, width, patch, arguments.seed).items():
        candidates = {
            "completed": complete(images, hole),
            "mirrored": complete(images[:, :, ::-1], hole[:, ::-1])[:, :, ::-1],
            "nothing kept": nothing_kept,
            "after the tokenizer": reconstructed,
        }
        report[name] = {kind: score(found, hole) for kind, found in candidates.items()}
        for kind, found in report[name].items():
            psnr, bits, distance = found.values()
            print(f"{name:14}{kind:18}{psnr:8.2f}{bits:12.1%}{distance:16.4f}", flush=True)
        figure += [np.where(hole[..., None], np.uint8(128), images), candidates["completed"]]
        captions += [name, "completed"]
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    with replace_file(out / "holes.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n")
    shown = np.concatenate([row[:COLUMNS] for row in figure])
    grid = image_files.grid(shown, min(COLUMNS, len(images)), captions)
    image_files.save_png(out / "holes.png", grid)


if __name__ == "__main__":
    sys.exit(run(main))
