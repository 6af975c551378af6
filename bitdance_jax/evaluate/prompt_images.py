"""Generates the images that GenEval, DPG-Bench, OneIG-Bench and TIIF-Bench score.

All processes generate, each on its own devices. Process 0 finds out what is missing, and writes the
folder for the benchmark's own scorer (`bitdance_jax.evaluate.prompt_files`).
"""

import functools
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from bitdance_jax.config import MeshConfig, SamplerConfig, to_dict
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.mesh import batch_parts
from bitdance_jax.errors import ConfigError, FileError, UserError, short
from bitdance_jax.evaluate.prompt_files import ImageFolder, Prompt
from bitdance_jax.evaluate.prompt_lists import (
    FOLDER_NAME,
    compare_with_published,
    read_dpg,
    read_geneval,
    read_oneig,
    read_tiif,
)
from bitdance_jax.io.model_lookup import fingerprint
from bitdance_jax.models.text_to_image import MAX_PROMPT, check_size
from bitdance_jax.pipelines.checks import model_name, parse_size
from bitdance_jax.pipelines.text_to_image import ALL_DEVICES, TextToImage
from bitdance_jax.pipelines.weights import WeightType
from bitdance_jax.text import prompt_tokenizer
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer


Benchmark = Literal["GenEval", "DPG-Bench", "OneIG-Bench", "TIIF-Bench"]

GUIDANCE: dict[Benchmark, float] = {
    "GenEval": 13.0,
    "DPG-Bench": 7.5,
    "OneIG-Bench": 7.5,
    "TIIF-Bench": 7.5,
}
"""Guidance scales: of GenEval and DPG-Bench those with which the released models were scored, of
the others the released models' default."""

HEAD_STEPS = 50
"""Of the released models' scores."""

MAX_IMAGES: dict[Benchmark, int] = {"DPG-Bench": 4, "OneIG-Bench": 4, "TIIF-Bench": 1}
"""Images of a prompt that the scorers read: one, or a grid of 2 by 2."""

NAMED: tuple[Benchmark, ...] = ("OneIG-Bench", "TIIF-Bench")
"""Benchmarks with a folder named after the model."""

STRIDE = 2**20
"""Image j of prompt i is number j * STRIDE + i of the seed, whatever the number of either."""

MAX_PER_PROMPT = 2**32 // STRIDE


@dataclass(frozen=True)
class Setting:
    """What is generated, and how.

    Attributes:
      benchmark: whose prompts and files.
      prompts: for GenEval a .jsonl, for DPG-Bench a folder of ID.txt or a .json, for OneIG-Bench a
        .csv, for TIIF-Bench a .jsonl or a folder of them.
      checkpoint: text-to-image model folder, local or gs://.
      out: local folder.
      name: of the model, in the folders of OneIG-Bench and TIIF-Bench; None: its folder's.
      size: WIDTHxHEIGHT in pixels.
      seed: of all images.
      per_prompt: images of each prompt.
      guidance_scale: None: the one of `GUIDANCE`.
      sampler: "fast": another solver (`SamplerConfig.named`); None: the model's.
      head_steps: N of the head's solver; None: 50, or those of `sampler`.
      limit: only the first prompts; None: all.
      batch_size: prompts at a time for each copy of the model.
      weights: the type of the weights in memory.
      mesh: the devices.

    Raises:
      ConfigError: `out` is not local, the name cannot be a folder's, or the benchmark has no such
        folder or cannot score such images.
    """

    benchmark: Benchmark
    prompts: str
    checkpoint: str
    out: str
    name: str | None = None
    size: str = "1024x1024"
    seed: int = 0
    per_prompt: int = 4
    guidance_scale: float | None = None
    sampler: str | None = None
    head_steps: int | None = None
    limit: int | None = None
    batch_size: int = 4
    weights: WeightType | None = None
    mesh: MeshConfig = ALL_DEVICES

    def __post_init__(self) -> None:
        if "://" in self.out:
            raise ConfigError(f"out must be a local folder for the scorers, got {self.out}", "out")
        height, width = parse_size(self.size)
        most = MAX_IMAGES.get(self.benchmark, MAX_PER_PROMPT)
        if self.per_prompt > most:
            raise ConfigError(
                f"{self.benchmark} scores at most {most} of the images of a prompt, "
                f"got per_prompt={self.per_prompt}",
                "per_prompt",
            )
        if self.benchmark == "DPG-Bench" and height != width:
            raise ConfigError(f"DPG-Bench scores square images, got {self.size}", "size")
        if self.name is not None and self.benchmark not in NAMED:
            raise ConfigError(
                f"{self.benchmark} has no folder of the model's name; omit name={self.name!r}",
                "name",
            )
        name = self.model_folder
        if name is not None and not FOLDER_NAME.fullmatch(name):
            raise ConfigError(
                f"{short(name)} cannot be the model's folder; give its name with letters, digits, "
                "_, +, . and -, such as name=bitdance",
                "name",
            )

    @property
    def model_folder(self) -> str | None:
        """The name of the model's folders; None if the benchmark has none."""
        if self.benchmark not in NAMED:
            return None
        return self.name or model_name(self.checkpoint).replace("/", "-")


def generate_images(setting: Setting) -> None:
    """Generates and writes the images that are missing in the folder."""
    prompts = _read_prompts(setting)
    model = TextToImage.load(
        setting.checkpoint, mesh=setting.mesh, weights=setting.weights, lazy=True
    )
    _check_lengths(prompts, setting.checkpoint)
    scale = setting.guidance_scale
    sampler = model.sampler.named(setting.sampler)
    steps = HEAD_STEPS if setting.sampler is None else sampler.head_steps
    sampler = replace(
        sampler,
        head_steps=setting.head_steps or steps,
        guidance_scale=GUIDANCE[setting.benchmark] if scale is None else scale,
    )
    check_size(model.config, *parse_size(setting.size))
    folder = ImageFolder(setting.out, _recorded(setting, prompts, sampler), setting.per_prompt)
    limit = min(setting.limit or len(prompts), len(prompts))
    is_first = jax.process_index() == 0
    with multihost.entered_on_process_0(folder.open()):
        if setting.benchmark == "GenEval" and is_first:
            print(f"note: {compare_with_published(prompts)}", file=sys.stderr)
        count = _generate_missing(folder, model, prompts, limit, setting, sampler)
    if is_first:
        now = f" ({count} generated now)" if count < limit else ""
        print(f"{setting.per_prompt} images of each of {limit} prompts in {setting.out}{now}")


def _read_prompts(setting: Setting) -> list[Prompt]:
    name = setting.model_folder or ""
    match setting.benchmark:
        case "GenEval":
            return read_geneval(setting.prompts)
        case "DPG-Bench":
            return read_dpg(setting.prompts)
        case "OneIG-Bench":
            return read_oneig(setting.prompts, name)
        case "TIIF-Bench":
            return read_tiif(setting.prompts, name)


def _generate_missing(
    folder: ImageFolder,
    model: TextToImage,
    prompts: list[Prompt],
    limit: int,
    setting: Setting,
    sampler: SamplerConfig,
) -> int:
    """Generates and writes what is missing of the first `limit` prompts; returns of how many."""
    at_once = setting.batch_size * batch_parts(model.mesh)
    groups = {
        start: prompts[start : min(start + at_once, limit)] for start in range(0, limit, at_once)
    }
    finished = {
        start: multihost.on_process_0(functools.partial(folder.finished, group))
        for start, group in groups.items()
    }
    missing = limit - sum(finished.values())
    is_first = jax.process_index() == 0
    # It appears with the first images. Until then the model shows its own bar.
    counts: dict[str, Any] = {
        "total": limit * setting.per_prompt,
        "initial": (limit - missing) * setting.per_prompt,
        "unit": "image",
        "delay": 1e-6,
    }
    with tqdm(**counts, disable=not is_first, dynamic_ncols=True) as bar:
        for start, group in groups.items():
            if finished[start] == len(group):
                continue
            images, texts = [], []
            show = is_first and bar.n == bar.initial
            for batch in _generate_batch(model, prompts, start, at_once, setting, sampler, show):
                images.append(batch[0])
                texts.append(batch[1])
                bar.update(len(group) - finished[start])
            by_prompt = np.stack(images, axis=1), list(zip(*texts, strict=True))
            multihost.on_process_0(functools.partial(folder.write, group, *by_prompt))
    multihost.on_process_0(folder.wait)
    return missing


def _generate_batch(
    model: TextToImage,
    prompts: list[Prompt],
    start: int,
    at_once: int,
    setting: Setting,
    sampler: SamplerConfig,
    show: bool,
) -> Iterator[tuple[UInt8[np.ndarray, "Q H W 3"], list[dict[str, str]]]]:
    """The first image of each of `at_once` prompts from number `start`, then the second, and so on.

    Each with its `Pipeline.metadata`. Prompts that are complete or past the limit are included, and
    past the end the last is repeated, so that programs and batches, and therefore the rounding, do
    not depend on what was skipped.
    """
    texts = [prompts[min(i, len(prompts) - 1)].text for i in range(start, start + at_once)]
    options: dict[str, Any] = {
        "size": setting.size,
        "seed": setting.seed,
        "sampler": sampler,
    }
    for j in range(setting.per_prompt):
        options["first_index"] = j * STRIDE + start
        images = model.sample(texts, batch_size=at_once, progress=show and j == 0, **options)
        yield images, model.metadata(texts, **options)


def _check_lengths(prompts: list[Prompt], checkpoint: str) -> None:
    """Checks all prompts before the weights are read.

    Raises:
      FileError: one is empty or too long.
    """
    tokenizer = PromptTokenizer(epath.Path(checkpoint) / prompt_tokenizer.FOLDER)
    for prompt in prompts:
        try:
            tokenizer.encode(prompt.text, MAX_PROMPT)
        except UserError as error:
            raise FileError(f"{prompt.where}: {error}") from error


def _recorded(setting: Setting, prompts: list[Prompt], sampler: SamplerConfig) -> dict[str, Any]:
    """All that the images depend on."""
    given = repr([(prompt.name, prompt.text, prompt.line) for prompt in prompts])
    height, width = parse_size(setting.size)
    return {
        "benchmark": setting.benchmark,
        "prompts": hashlib.sha256(given.encode()).hexdigest()[:12],
        "checkpoint": fingerprint(setting.checkpoint),
        "weights": setting.weights,
        "size": f"{width}x{height}",
        "seed": setting.seed,
        "per_prompt": setting.per_prompt,
        **({} if setting.model_folder is None else {"name": setting.model_folder}),
        **to_dict(sampler),
    }
