"""`bitdance sample`: generates images with a model.

    bitdance sample --prompt "woman astronaut, dark skin tone"
    bitdance sample --labels heart clothing --out grid.png
    bitdance sample --checkpoint MODEL --npz samples.npz --num-images 50000
    bitdance sample --checkpoint MODEL --prompt "a cat on a mat" --size 1024x1024 --out cat.png
    bitdance sample --checkpoint MODEL --prompt "make it night" --image cat.png --out night.png
    bitdance sample --checkpoint MODEL --prompt "a dog" --complete cat.png --mask mask.png

The output is a PNG with a row of images per label, an .npz for an evaluation suite, or images of
prompts.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np
from jaxtyping import UInt8

from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.cli.processes import together
from bitdance_jax.config import MeshConfig, SamplerConfig
from bitdance_jax.config.plain import (
    BatchSize,
    Config,
    Count,
    HeadSteps,
    Natural,
    PathName,
    Range,
    Share,
)
from bitdance_jax.config.sampler import SamplerName, ScheduleName, SolverName
from bitdance_jax.data.emoji import EXAMPLES
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.consistency import check_same
from bitdance_jax.errors import ConfigError
from bitdance_jax.io import image_files, model_lookup
from bitdance_jax.io.model_lookup import (
    EMBEDDED,
    EMBEDDED_CLASSES,
    check_unchanged,
    fingerprint,
    is_embedded,
)
from bitdance_jax.io.paths import check_suffix
from bitdance_jax.pipelines.checks import parse_size
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.pipelines.given_images import Given
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.pipelines.image_prompts import ImagePrompt
from bitdance_jax.pipelines.npz import Request, sample_to_npz
from bitdance_jax.pipelines.pipeline import common_description
from bitdance_jax.pipelines.text_to_image import ALL_DEVICES, TextToImage
from bitdance_jax.pipelines.weighted import Weighted
from bitdance_jax.pipelines.weights import WeightType


EXAMPLES_EACH = 4
"""Images of each of the embedded model's default prompts."""

EMBEDDED_BATCH = 32

CLASS_FLAGS = ("labels", "per_label", "npz")
PROMPT_FLAGS = (
    "prompt",
    "negative_prompt",
    "prompt_weights",
    "image",
    "size",
    "per_prompt",
    "weights",
    "lora",
)
"""Fields that only one kind of model takes."""


@dataclass(frozen=True)
class Arguments(Config):
    """Generates a grid of images, a row per label; with --npz, images for an evaluation suite.

    Image i of an .npz has label i % classes. It is written as OUT.npz.partial, on all devices;
    after an interruption, the same command resumes. The memory does not depend on --num-images. A
    text-to-image model takes --prompt instead of --labels: one image is saved as it is, several as
    a grid, a row per prompt.

    Attributes:
      checkpoint: model folder, local or gs://, the folder of a training run, finished or not, or a
        Hugging Face id, OWNER/REPOSITORY or OWNER/REPOSITORY/FILE, which is converted once into a
        cache; "emoji" and "emoji_classes" are the small models of the package. Default: "emoji",
        or with labels or --npz "emoji_classes".
      labels: names or numbers; default: all of the model (of more than 10 the first 10).
      prompt: what the images of a text-to-image model show; default, for "emoji" alone: eight.
      negative_prompt: what they should not show, in place of guidance's unconditional prompt.
      prompt_weights: one for each `prompt`: all prompts make one image, weighted.
      image: files that each prompt shows to a text-to-image model, such as the image to edit.
      complete: image of which the model samples only a part: all patches with a masked pixel, and
        with `keep_patches` those from this number on.
      mask: image as large as `complete`, white where it is sampled anew.
      keep_patches: keep only the first K patches of `complete`, in the model's order.
      at: row and column in pixels of the upper left corner of `complete` on a larger canvas.
      paste: kept patches show the pixels of `complete`, not those that the tokenizer decodes.
      size: WIDTHxHEIGHT in pixels of a text-to-image model's images; default: that of `complete`
        without `at`, of the first `image`, or of the model folder, for released models 1024x1024.
      per_label: images per label of a grid; default: 8.
      per_prompt: images per prompt; default: 1, of the default prompts 4.
      seed: image i of a seed is the same for any batch size.
      out: the PNG.
      sampler: "fast": a solver of the second order with 12 steps; other flags may change it.
      head_steps: N of the head's solver; default: the model's, as for the next seven.
      guidance_scale: classifier-free guidance; 1 for none.
      guidance_schedule: over the patches: constant or linear.
      solver: euler_maruyama (as released), euler (the paper's), heun (two evaluations a step),
        multistep_sde or multistep_ode (second order, one evaluation a step).
      guidance_start, guidance_end: times of the head, from 0 (noise) to 1 (data), between which
        guidance is applied.
      guidance_patch_start, guidance_patch_end: patches, from 0 (the first) to 1 (the last), between
        which guidance is applied.
      batch_size: images generated at a time, with --npz on each device; default: 24, for prompts 4,
        for those of "emoji" 32.
      dtype: of weights and activations; default: float32, for prompts on accelerators bfloat16.
      weights: the type of a text-to-image model's weights in memory; default: `dtype`.
      lora: folder of an adapter of a text-to-image model, in PEFT's files (adapter_config.json).
      mesh: the devices of a text-to-image model; default: each layer is sharded over all.
      compilation_cache: folder, local or gs://, for compiled programs, which makes the next start
        faster; default: for one process a folder in the user's cache. Of several hosts only the
        first writes, and all read.
      npz: the .npz, instead of a grid: arr_0 uint8 [N, H, W, 3], and the labels as arr_1.
      num_images: N for --npz; default: 50,000.
      overwrite: replace an existing .npz, or an unfinished one that is damaged or has other
        settings.
      multi_host: this is one of several processes, on as many hosts, that generate an .npz or
        prompts together (bitdance_jax/distributed/multihost.py); all get the same flags, and
        process 0 writes.
    """

    ALIASES: ClassVar[dict[str, str]] = {"images_per_input": "per_prompt"}

    checkpoint: PathName | None = None
    labels: tuple[str, ...] | None = None
    prompt: tuple[str, ...] | None = None
    negative_prompt: str | None = None
    prompt_weights: tuple[float, ...] | None = None
    image: tuple[PathName, ...] | None = None
    complete: PathName | None = None
    mask: PathName | None = None
    keep_patches: Natural | None = None
    at: tuple[Natural, Natural] | None = None
    paste: bool = False
    size: str | None = None
    per_label: Count | None = None
    per_prompt: Count | None = None
    seed: int = 0
    out: PathName = "samples.png"
    sampler: SamplerName | None = None
    head_steps: HeadSteps | None = None
    guidance_scale: float | None = None
    guidance_schedule: ScheduleName | None = None
    solver: SolverName | None = None
    guidance_start: Share | None = None
    guidance_end: Share | None = None
    guidance_patch_start: Share | None = None
    guidance_patch_end: Share | None = None
    batch_size: BatchSize | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: WeightType | None = None
    lora: PathName | None = None
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
    with together(arguments, arguments.multi_host):
        keep_compiled(arguments.compilation_cache)
        return generate(arguments, local_folder(arguments.checkpoint or embedded(arguments)))


def embedded(arguments: Arguments) -> str:
    """The model of the package that the other flags are for."""
    return EMBEDDED_CLASSES if given_fields(arguments, CLASS_FLAGS) else EMBEDDED


def check_values(arguments: Arguments) -> None:
    """Raises a ConfigError for values that no model takes."""
    check_suffix(arguments.out, ".png", "out")
    for name in ("mask", "keep_patches", "at", "paste"):
        if getattr(arguments, name) not in (None, False) and arguments.complete is None:
            raise ConfigError(f"{name} needs --complete IMAGE", name)
    if arguments.npz is not None:
        if arguments.labels is not None:
            raise ConfigError("labels are for a grid; an .npz has all labels in turn", "labels")
        if arguments.per_label is not None:
            raise ConfigError("per_label is for a grid; an .npz takes --num-images", "per_label")
        if arguments.complete is not None:
            raise ConfigError("complete is for a grid; omit --npz", "complete")
        return
    for name in ("num_images", "overwrite"):
        if getattr(arguments, name):
            raise ConfigError(f"{name} needs --npz OUT.npz", name)
    if arguments.multi_host and not arguments.prompt:
        raise ConfigError(
            "multi_host needs --npz OUT.npz or --prompt; a grid of labels takes one process",
            "multi_host",
        )


def generate(arguments: Arguments, folder: str) -> int:
    """Generates and writes what is asked for with the model of a folder; returns the exit
    status."""
    kind = model_lookup.read_config(folder).kind
    if folder == EMBEDDED and not given_fields(arguments, ("prompt", "image", "complete")):
        arguments = dataclasses.replace(
            arguments, prompt=EXAMPLES, per_prompt=arguments.per_prompt or EXAMPLES_EACH
        )
    if kind in ("class_conditional", "text_to_image"):
        check_flags(arguments, folder, kind == "text_to_image")
    if kind == "text_to_image":
        generate_prompts(arguments, folder)
        return 0
    mark = fingerprint(folder)
    mesh = None if arguments.npz is None else MeshConfig(data=-1)
    model = ClassConditionalPipeline.load(folder, dtype=arguments.dtype, mesh=mesh)
    sampler = chosen_sampler(arguments, model.sampler)
    if arguments.npz is None:
        generate_grid(arguments, model, sampler)
        return 0
    try:
        check_unchanged(folder, mark)
        check_same({"the checkpoint's config and weights": mark})
        write_npz(arguments, arguments.npz, mark, model, sampler)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


def check_flags(arguments: Arguments, folder: str, is_text_to_image: bool) -> None:
    """Raises a ConfigError for flags of the other kind of model, or without a prompt."""
    kind, other, example = "class-conditional", "text-to-image", EMBEDDED
    fields: Sequence[str] = PROMPT_FLAGS
    if is_text_to_image:
        kind, other, example = other, kind, EMBEDDED_CLASSES
        fields = CLASS_FLAGS
    wrong = given_fields(arguments, fields)
    if not is_text_to_image and arguments.mesh != ALL_DEVICES:
        wrong.append("mesh")
    if wrong:
        message = f"{folder} is a {kind} model; {as_flags(wrong)} is for {other} models"
        if is_embedded(folder):
            message += f" such as {example}"
        if arguments.checkpoint is None:
            message += f", the default without {as_flags(given_fields(arguments, CLASS_FLAGS))}"
        raise ConfigError(message, wrong[0])
    if is_text_to_image and not arguments.prompt:
        raise ConfigError(f"prompt is missing; {folder} is a text-to-image model", "prompt")


def given_fields(arguments: Arguments, fields: Sequence[str]) -> list[str]:
    """Those of the fields that have a value."""
    return [name for name in fields if getattr(arguments, name) is not None]


def as_flags(fields: Sequence[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in fields)


def chosen_sampler(arguments: Arguments, default: SamplerConfig) -> SamplerConfig:
    """The model's sampler with the values of the flags."""
    names = given_fields(arguments, [field.name for field in dataclasses.fields(SamplerConfig)])
    named = default.named(arguments.sampler)
    return dataclasses.replace(named, **{name: getattr(arguments, name) for name in names})


def given_image(arguments: Arguments) -> Given | None:
    """The image to complete."""
    if arguments.complete is None:
        return None
    return Given(
        arguments.complete, arguments.mask, arguments.keep_patches, arguments.at, arguments.paste
    )


def default_size(
    arguments: Arguments, model: TextToImage, fitted: list[UInt8[np.ndarray, "h w 3"]]
) -> tuple[int, int]:
    """(height, width) of images of prompts without --size."""
    if arguments.complete is not None and arguments.at is None:
        height, width, _ = image_files.load_image(arguments.complete).shape
        return height, width
    return fitted[0].shape[:2] if fitted else model.default_size


def generate_prompts(arguments: Arguments, folder: str) -> None:
    prompts: Any = arguments.prompt or ()
    each = 1 if arguments.per_prompt is None else arguments.per_prompt
    multihost.on_process_0(lambda: image_files.check_writable(arguments.out))
    model = TextToImage.load(
        folder,
        dtype=arguments.dtype,
        mesh=arguments.mesh,
        weights=arguments.weights,
        lora=arguments.lora,
        lazy=True,
    )
    fitted = [model.fit(file) for file in arguments.image or ()]
    default = default_size(arguments, model, fitted)
    size = "{1}x{0}".format(*default) if arguments.size is None else arguments.size
    image_files.check_grid(len(prompts) * each, *parse_size(size))
    if fitted:
        shown = [model.show(image) for image in fitted]
        prompts = [ImagePrompt(text, shown) for text in prompts]
    if arguments.prompt_weights is not None:
        prompts = [Weighted(prompts, arguments.prompt_weights)]
    chosen: dict[str, Any] = {
        "size": size,
        "images_per_input": each,
        "seed": arguments.seed,
        "sampler": chosen_sampler(arguments, model.sampler),
        "negative_prompt": arguments.negative_prompt,
        "given": given_image(arguments),
    }
    images = model.sample(
        prompts,
        **chosen,
        batch_size=arguments.batch_size or (EMBEDDED_BATCH if folder == EMBEDDED else 4),
        progress=jax.process_index() == 0,
    )
    text = common_description(model.metadata(prompts, **chosen))
    titles = EXAMPLES if prompts == EXAMPLES else None
    multihost.on_process_0(lambda: save_prompts(arguments.out, images, len(prompts), text, titles))


def save_prompts(
    path: str,
    images: UInt8[np.ndarray, "B H W 3"],
    prompts: int,
    text: dict[str, str],
    titles: Sequence[str] | None = None,
) -> None:
    """Saves one image as it is, one image per prompt as a square grid, more as a row per prompt.

    With titles there is always a row per prompt, with its title beside it.
    """
    each = len(images) // prompts
    columns = each if each > 1 or titles else math.isqrt(len(images) - 1) + 1
    image = images[0] if len(images) == 1 else image_files.grid(images, columns, titles)
    image_files.save_png(path, image, text=text)
    print(f"{counted(len(images), 'image')} of {images.shape[2]}x{images.shape[1]} in {path}")


def label_batch_size(arguments: Arguments, count: int) -> int:
    """At most the number of images, because batches are padded to their full size."""
    return 24 if arguments.batch_size is None else min(arguments.batch_size, count)


def generate_grid(
    arguments: Arguments, model: ClassConditionalPipeline, sampler: SamplerConfig
) -> None:
    image_files.check_writable(arguments.out)
    labels = [model.label(label) for label in arguments.labels or model.class_names[:10]]
    each = 8 if arguments.per_label is None else arguments.per_label
    size = model.config.image_size
    count = len(labels) * each
    enlarge = max(1, 128 // size)
    image_files.check_grid(count, enlarge * size, enlarge * size)
    numbers = np.repeat(labels, each).tolist()
    batch_size = label_batch_size(arguments, count)
    chosen: dict[str, Any] = {"sampler": sampler, "given": given_image(arguments)}
    images = model.sample(numbers, arguments.seed, **chosen, batch_size=batch_size)
    captions = [model.class_names[label] for label in labels]
    grid = image_files.grid(images, each, captions, enlarge=enlarge)
    text = common_description(model.metadata(numbers, arguments.seed, **chosen))
    image_files.save_png(arguments.out, grid, text=text)
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
    is_first = jax.process_index() == 0
    generated = sample_to_npz(
        path,
        model,
        request,
        per_device=label_batch_size(arguments, count),
        overwrite=arguments.overwrite,
        progress=is_first,
    )
    if is_first:
        labels = counted(min(count, model.config.num_classes), "label")
        now = f" ({generated} generated now)" if generated < count else ""
        print(f"{counted(count, 'image')} of {labels} in {path}{now}")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
