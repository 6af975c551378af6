"""Draws images from a model folder: a labelled grid as a PNG, any number of them as an .npz for an evaluation suite, or prompts.

`python sample.py` draws a grid of the embedded emoji model as samples.png;
`python sample.py --checkpoint FOLDER --prompt "a cat on a mat" --size 1024x1024 --out cat.png` draws a prompt with a text-to-image model.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from bitdance_jax.cli.command_line import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import MeshConfig, SamplerConfig
from bitdance_jax.config.model import SolverName
from bitdance_jax.config.plain import BatchSize, Config, Count, HeadSteps, PathName, Range, Share
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.consistency import check_same, check_same_config
from bitdance_jax.errors import UserError
from bitdance_jax.io import image_files, model_lookup
from bitdance_jax.io.model_lookup import check_unchanged, fingerprint
from bitdance_jax.io.paths import check_suffix
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline, load
from bitdance_jax.pipelines.npz import Request, sample_to_npz
from bitdance_jax.pipelines.text_to_image import ALL_DEVICES, TextToImage, Weights, parse_size


@dataclass(frozen=True)
class Arguments(Config):
    """Draws a grid of images, one row a label; with --npz, images for an evaluation suite, image i with label i % classes.

    An .npz grows as OUT.npz.partial, on all devices; stopped or killed, the same command goes on. Memory does not grow with --num-images.
    A text-to-image model takes --prompt instead of --labels: one image of a prompt as it is, several as a grid, one row a prompt.

    Attributes:
      checkpoint: model folder, local or gs://, or a training run's folder, also of one that is not finished; "emoji" is the small model
        that comes with the package.
      labels: names or numbers; all of the model's if left out (the first 10 of a model with more).
      prompt: what a text-to-image model shall draw.
      size: WIDTHxHEIGHT in pixels, of a text-to-image model's images; 1024x1024 if left out.
      per_label: images of each label.
      per_prompt: images of each prompt; 1 if left out.
      seed: image i of a seed is the same whatever the batch size.
      out: the PNG.
      head_steps: N of the head's solver; left out, the model's own, like the next five.
      guidance_scale: classifier-free guidance; 1 for none.
      guidance_schedule: over the patches.
      solver: as released, the paper's plain Euler, or Heun's method.
      guidance_start, guidance_end: times of the head, 0 for noise to 1 for data, outside which there is no guidance.
      batch_size: images drawn at a time, on each device with --npz; 24 if left out, 4 for prompts.
      dtype: of weights and activations; float32 if left out, but for prompts on accelerators bfloat16.
      weights: the type that a text-to-image model's weights are kept in, `dtype` if left out.
      mesh: the devices of a text-to-image model; all of them share every layer if left out.
      compilation_cache: folder, local or gs://, where compiled programs are kept: the same command starts sooner the next time. Of
        several hosts the first one alone writes there, and all read.
      npz: the .npz, instead of a grid: arr_0 uint8 [N, H, W, 3] and the labels as arr_1.
      num_images: N for --npz; 50,000 if left out.
      overwrite: replace an .npz that is there, or an unfinished one that is damaged or was begun otherwise.
      multi_host: this is one of several processes, on as many hosts, that draw an .npz or prompts together
        (bitdance_jax/distributed/multihost.py); all get the same flags, and process 0 writes.
    """

    checkpoint: PathName = "emoji"
    labels: tuple[str, ...] | None = None
    prompt: tuple[str, ...] | None = None
    size: str | None = None
    per_label: Count = 8
    per_prompt: Count | None = None
    seed: int = 0
    out: PathName = "samples.png"
    head_steps: HeadSteps | None = None
    guidance_scale: float | None = None
    guidance_schedule: Literal["linear", "constant"] | None = None
    solver: SolverName | None = None
    guidance_start: Share | None = None
    guidance_end: Share | None = None
    batch_size: BatchSize | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: Weights | None = None
    mesh: MeshConfig = ALL_DEVICES
    compilation_cache: PathName | None = None
    npz: PathName | None = None
    num_images: Annotated[int, Range(1, 10**8)] | None = None
    overwrite: bool = False
    multi_host: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self)


def main() -> int:
    arguments = parse(Arguments)
    if arguments.multi_host and not multihost.initialize():
        raise UserError(
            "--multi-host finds no other processes; on each set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    with multihost.stop_all_on_error():
        if arguments.multi_host:
            check_same_config(arguments)
        if arguments.compilation_cache is not None:
            keep_compiled(arguments.compilation_cache)
        return draw(arguments)


def check_values(arguments: Arguments) -> None:
    """Raises a UserError for what no model takes."""
    check_suffix(arguments.out, ".png", "out")
    if arguments.npz is not None:
        if arguments.labels is not None:
            raise UserError("--labels are for a grid; an .npz holds all of them in turn")
        return
    for name in ("num_images", "overwrite"):
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} belongs to --npz OUT.npz")
    if arguments.multi_host and not arguments.prompt:
        raise UserError(
            "--multi-host belongs to --npz OUT.npz and to --prompt; one process draws a grid of labels"
        )


def draw(arguments: Arguments) -> int:
    kind = model_lookup.read_config(arguments.checkpoint).kind
    if kind != "tokenizer":
        check_flags(arguments, kind == "text_to_image")
    if kind == "text_to_image":
        draw_prompts(arguments)
        return 0
    mark = fingerprint(arguments.checkpoint)
    model = load(arguments.checkpoint, jnp.dtype(arguments.dtype or "float32"))
    if not isinstance(model, ClassConditionalPipeline):
        raise UserError(
            f"{arguments.checkpoint} is a tokenizer, which draws nothing by itself; give a class-conditional model"
        )
    sampler = chosen_sampler(arguments, model.sampler)
    if arguments.npz is None:
        draw_grid(arguments, model, sampler)
        return 0
    try:
        check_unchanged(arguments.checkpoint, mark)
        check_same({"the checkpoint's config and weights": mark})
        write_npz(arguments, arguments.npz, mark, model, sampler)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def check_flags(arguments: Arguments, text_to_image: bool) -> None:
    """Raises a UserError for flags of the other kind of model."""
    other = ("labels", "npz") if text_to_image else ("prompt", "size", "per_prompt", "weights")
    given = [name for name in other if getattr(arguments, name) is not None]
    if not text_to_image and arguments.mesh != ALL_DEVICES:
        given.append("mesh")
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        kinds = (
            ("text-to-image", "class-conditional")
            if text_to_image
            else ("class-conditional", "text-to-image")
        )
        takes = "--prompt" if text_to_image else "--labels"
        raise UserError(
            f"{arguments.checkpoint} is a {kinds[0]} model, which takes {takes}; {names} belongs to {kinds[1]} ones"
        )
    if text_to_image and not arguments.prompt:
        raise UserError(
            f'{arguments.checkpoint} is a text-to-image model; say what it shall draw: --prompt "a cat on a mat"'
        )


def chosen_sampler(arguments: Arguments, own: SamplerConfig) -> SamplerConfig:
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(SamplerConfig)}
    return dataclasses.replace(
        own, **{name: value for name, value in given.items() if value is not None}
    )


def draw_prompts(arguments: Arguments) -> None:
    prompts = arguments.prompt or ()
    size = "1024x1024" if arguments.size is None else arguments.size
    each = 1 if arguments.per_prompt is None else arguments.per_prompt
    image_files.check_grid(len(prompts) * each, *parse_size(size))
    multihost.on_process_0(lambda: image_files.check_writable(arguments.out))
    model = TextToImage(
        arguments.checkpoint, dtype=arguments.dtype, mesh=arguments.mesh, weights=arguments.weights
    )
    images = model.generate(
        prompts,
        size=size,
        images_per_prompt=each,
        seed=arguments.seed,
        sampler=chosen_sampler(arguments, model.sampler),
        batch_size=4 if arguments.batch_size is None else arguments.batch_size,
        progress=jax.process_index() == 0,
    )
    multihost.on_process_0(lambda: save_prompts(arguments.out, images, len(prompts)))


def save_prompts(path: str, images: UInt8[np.ndarray, "N H W 3"], prompts: int) -> None:
    """One image as it is; of one each about as many rows as columns; else a row a prompt."""
    each = len(images) // prompts
    columns = each if each > 1 else math.isqrt(len(images) - 1) + 1
    image_files.save_png(path, images[0] if len(images) == 1 else image_files.grid(images, columns))
    print(f"{counted(len(images), 'image')} of {images.shape[2]}x{images.shape[1]} in {path}")


def labels_at_a_time(arguments: Arguments, count: int) -> int:
    """Of so many in all: a batch is filled up, so that a large one would be drawn for nothing."""
    return 24 if arguments.batch_size is None else min(arguments.batch_size, count)


def draw_grid(
    arguments: Arguments, model: ClassConditionalPipeline, sampler: SamplerConfig
) -> None:
    image_files.check_writable(arguments.out)
    labels = [model.label(label) for label in arguments.labels or model.class_names[:10]]
    size, count = model.config.image_size, len(labels) * arguments.per_label
    enlarge = max(1, 128 // size)
    image_files.check_grid(count, enlarge * size, enlarge * size)
    numbers = np.repeat(labels, arguments.per_label).tolist()
    at_a_time = labels_at_a_time(arguments, count)
    images = model.sample(numbers, arguments.seed, sampler=sampler, batch_size=at_a_time)
    captions = [model.class_names[label] for label in labels]
    image_files.save_png(
        arguments.out, image_files.grid(images, arguments.per_label, captions, enlarge=enlarge)
    )
    print(f"{counted(len(images), 'image')} of {counted(len(labels), 'label')} in {arguments.out}")


def write_npz(
    arguments: Arguments,
    path: str,
    mark: str,
    model: ClassConditionalPipeline,
    sampler: SamplerConfig,
) -> None:
    count = 50_000 if arguments.num_images is None else arguments.num_images
    request = Request(mark, arguments.dtype or "float32", count, arguments.seed, sampler)
    first_host = jax.process_index() == 0
    per_device, overwrite = labels_at_a_time(arguments, count), arguments.overwrite
    drawn = sample_to_npz(
        path, model, request, per_device=per_device, overwrite=overwrite, progress=first_host
    )
    if first_host:
        labels = counted(min(count, model.config.num_classes), "label")
        now = f" ({drawn} drawn now)" if drawn < count else ""
        print(f"{counted(count, 'image')} of {labels} in {path}{now}")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
