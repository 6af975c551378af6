"""Draws pictures from a model folder: `python sample.py` draws a labelled grid of the embedded emoji model as samples.png."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from bitdance_jax import ClassConditionalPipeline, images, load
from bitdance_jax.command_line import parse, run
from bitdance_jax.config import SamplerConfig
from bitdance_jax.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Draws a grid of pictures, one row a label.

    Attributes:
      checkpoint: model folder, local or gs://; "emoji" is the small model that comes with the package.
      labels: names or numbers; all of the model's if left out (the first 10 of a model with more).
      per_label: pictures of each label.
      seed: picture i of a seed is the same whatever the batch size.
      out: the PNG.
      head_steps: N of the head's solver; left out, the model's own, like the next three.
      guidance_scale: classifier-free guidance; 1 for none.
      guidance_schedule: over the patches.
      solver: as released, or the paper's plain Euler.
      batch_size: pictures drawn at a time.
      dtype: of weights and activations.
    """

    checkpoint: str = "emoji"
    labels: tuple[str, ...] | None = None
    per_label: int = 8
    seed: int = 0
    out: str = "samples.png"
    head_steps: int | None = None
    guidance_scale: float | None = None
    guidance_schedule: Literal["linear", "constant"] | None = None
    solver: Literal["euler_maruyama", "euler"] | None = None
    batch_size: int = 24
    dtype: Literal["float32", "bfloat16"] = "float32"


def main() -> None:
    arguments = parse(Arguments)
    if arguments.per_label < 1:
        raise UserError(f"--per-label must be positive, got {arguments.per_label}")
    model = load(arguments.checkpoint, jnp.dtype(arguments.dtype))
    if not isinstance(model, ClassConditionalPipeline):
        raise UserError(f"{arguments.checkpoint} is a tokenizer, which draws nothing by itself; give a class-conditional model")
    images.check_writable(arguments.out)
    labels = [model.label(label) for label in arguments.labels or model.class_names[:10]]
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(SamplerConfig)}
    sampler = dataclasses.replace(model.sampler, **{name: value for name, value in given.items() if value is not None})
    pictures = model.sample(
        np.repeat(labels, arguments.per_label).tolist(), arguments.seed, sampler=sampler, batch_size=arguments.batch_size
    )
    size = pictures.shape[1]
    captions = [model.class_names[label] for label in labels]
    images.save_png(arguments.out, images.grid(pictures, arguments.per_label, captions, enlarge=max(1, 128 // size)))
    print(f"{len(pictures)} pictures of {len(labels)} labels in {arguments.out}")


if __name__ == "__main__":
    sys.exit(run(main))
