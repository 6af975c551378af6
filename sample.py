"""Draws pictures from a model folder: a labelled grid as a PNG, or any number of them as an .npz for an evaluation suite.

`python sample.py` draws a grid of the embedded emoji model as samples.png.
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bitdance_jax import ClassConditionalPipeline, hosts, images, load
from bitdance_jax.command_line import parse, run
from bitdance_jax.config import SamplerConfig
from bitdance_jax.errors import UserError
from bitdance_jax.sampling.npz import Request, sample_to_npz
from bitdance_jax.sampling.pipeline import fingerprint


@dataclass(frozen=True)
class Arguments:
    """Draws a grid of pictures, one row a label; with --npz, pictures for an evaluation suite, picture i with label i % classes.

    An .npz grows as OUT.npz.partial, on all devices; stopped or killed, the same command goes on. Memory does not grow with --num-images.

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
      batch_size: pictures drawn at a time, on each device with --npz.
      dtype: of weights and activations.
      npz: the .npz, instead of a grid: arr_0 uint8 [N, H, W, 3] and the labels as arr_1.
      num_images: N for --npz; 50,000 if left out.
      overwrite: replace an .npz that is there, or an unfinished one that was begun otherwise.
      multi_host: this is one of several processes, on as many hosts, that draw the .npz together (bitdance_jax/hosts.py); all get
        the same flags, and process 0 writes.
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
    npz: str | None = None
    num_images: int | None = None
    overwrite: bool = False
    multi_host: bool = False


def main() -> int:
    arguments = parse(Arguments)
    if arguments.per_label < 1:
        raise UserError(f"--per-label must be positive, got {arguments.per_label}")
    if arguments.npz is None:
        for name in ("num_images", "overwrite", "multi_host"):
            if getattr(arguments, name):
                raise UserError(f"--{name.replace('_', '-')} belongs to --npz OUT.npz")
    elif arguments.labels is not None:
        raise UserError("--labels are for a grid; an .npz holds all of them in turn")
    if arguments.multi_host and not hosts.start():
        raise UserError("--multi-host finds no other processes; on each set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID")
    with hosts.together():
        return draw(arguments)


def draw(arguments: Arguments) -> int:
    model = load(arguments.checkpoint, jnp.dtype(arguments.dtype))
    if not isinstance(model, ClassConditionalPipeline):
        raise UserError(f"{arguments.checkpoint} is a tokenizer, which draws nothing by itself; give a class-conditional model")
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(SamplerConfig)}
    sampler = dataclasses.replace(model.sampler, **{name: value for name, value in given.items() if value is not None})
    if arguments.npz is None:
        draw_grid(arguments, model, sampler)
        return 0
    try:
        write_npz(arguments, arguments.npz, model, sampler)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def draw_grid(arguments: Arguments, model: ClassConditionalPipeline, sampler: SamplerConfig) -> None:
    images.check_writable(arguments.out)
    labels = [model.label(label) for label in arguments.labels or model.class_names[:10]]
    pictures = model.sample(
        np.repeat(labels, arguments.per_label).tolist(), arguments.seed, sampler=sampler, batch_size=arguments.batch_size
    )
    size = pictures.shape[1]
    captions = [model.class_names[label] for label in labels]
    images.save_png(arguments.out, images.grid(pictures, arguments.per_label, captions, enlarge=max(1, 128 // size)))
    print(f"{len(pictures)} pictures of {len(labels)} labels in {arguments.out}")


def write_npz(arguments: Arguments, path: str, model: ClassConditionalPipeline, sampler: SamplerConfig) -> None:
    count = 50_000 if arguments.num_images is None else arguments.num_images
    request = Request(fingerprint(arguments.checkpoint), arguments.dtype, count, arguments.seed, sampler)
    first_host = jax.process_index() == 0
    per_device, overwrite = arguments.batch_size, arguments.overwrite
    drawn = sample_to_npz(path, model, request, per_device=per_device, overwrite=overwrite, progress=first_host)
    if first_host:
        print(f"{count} pictures of {model.config.num_classes} labels in {path}" + (f" ({drawn} drawn now)" if drawn < count else ""))


if __name__ == "__main__":
    sys.exit(run(main))
