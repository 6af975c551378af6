"""The images that GenEval and DPG-Bench score, of the prompts that come with them.

python -m bitdance_jax.evaluate.prompts --checkpoint MODEL --geneval evaluation_metadata_long.jsonl --out geneval
python -m bitdance_jax.evaluate.prompts --checkpoint MODEL --dpg dpg_bench/prompts --out dpg

The folder is then what the benchmark's own scorer reads (`bitdance_jax.evaluate.prompt_files`). All processes draw, each on its own
devices; process 0 looks what is there, and writes.
"""

import functools
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from bitdance_jax.cli.command_line import Flags, keep_compiled, parse, run
from bitdance_jax.config import MeshConfig, SamplerConfig, to_dict
from bitdance_jax.config.plain import BatchSize, Count, HeadSteps, PathName, Range
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.consistency import check_same_config
from bitdance_jax.distributed.mesh import batch_parts
from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.prompt_files import (
    ImageFolder,
    Prompt,
    geneval_figure,
    read_dpg,
    read_geneval,
)
from bitdance_jax.io.model_lookup import fingerprint
from bitdance_jax.models.text_to_image import MAX_PROMPT, check_size
from bitdance_jax.pipelines.class_conditional import check_seed
from bitdance_jax.pipelines.text_to_image import ALL_DEVICES, TextToImage, Weights, parse_size
from bitdance_jax.text import prompt_tokenizer
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer


GENEVAL_GUIDANCE, DPG_GUIDANCE = 13.0, 7.5
"""Guidance scales with which the released models were scored."""

DPG_IMAGES = 4
"""That DPG-Bench's scorer looks at, at most: it cuts them out of a grid of two by two squares."""

STRIDE = 2**20
"""Image j of prompt i is number j * STRIDE + i of the seed's: the same however many there are of prompts and images."""


@dataclass(frozen=True)
class Arguments(Flags):
    """Draws the prompts of GenEval or DPG-Bench into a folder for their scorers, with the settings of the released models.

    Stopped or killed, the same command goes on: prompts whose files are all there are not drawn anew. OUT.settings.json says how they were
    drawn.

    Attributes:
      checkpoint: text-to-image model folder, local or gs://.
      out: the folder.
      geneval: evaluation_metadata_long.jsonl, the rewritten prompts for which the release's figure is, GenEval's own
        evaluation_metadata.jsonl, or lines like theirs: objects with a "prompt".
      dpg: DPG-Bench's folder of ID.txt, or a .json of {id: prompt}.
      size: WIDTHxHEIGHT in pixels.
      seed: image j of prompt i depends on seed, i and j alone, up to rounding.
      per_prompt: images of each prompt.
      guidance_scale: 13.0 for GenEval and 7.5 for DPG-Bench if left out.
      head_steps: N of the head's solver.
      limit: draw the first prompts only; a later start may draw more.
      batch_size: images drawn at a time by each copy of the model (--mesh.data times --mesh.fsdp); they are of as many prompts.
      weights: the type that the weights are kept in.
      mesh: the devices; all of them share every layer if left out, with --multi-host those of each host.
      compilation_cache: folder, local or gs://, where compiled programs are kept: the same command starts sooner the next time. Of
        several hosts the first one alone writes there, and all read.
      multi_host: this is one of several processes, on as many hosts, that draw together
        (bitdance_jax/distributed/multihost.py); all get the same flags,
        and process 0 writes.
    """

    checkpoint: PathName
    out: PathName
    geneval: PathName | None = None
    dpg: PathName | None = None
    size: str = "1024x1024"
    seed: int = 0
    per_prompt: Annotated[int, Range(1, 2**32 // STRIDE)] = 4
    guidance_scale: float | None = None
    head_steps: HeadSteps = 50
    limit: Count | None = None
    batch_size: BatchSize = 4
    weights: Weights | None = None
    mesh: MeshConfig = ALL_DEVICES
    compilation_cache: PathName | None = None
    multi_host: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.geneval is None) == (self.dpg is None):
            raise UserError(
                "give one of --geneval evaluation_metadata_long.jsonl and --dpg PROMPTS, a folder of ID.txt or a .json"
            )
        if "://" in self.out:
            raise UserError(f"--out must be a local folder, which the scorers read, got {self.out}")
        height, width = parse_size(self.size)
        if self.dpg is not None and (height != width or self.per_prompt > DPG_IMAGES):
            raise UserError(
                f"DPG-Bench's scorer takes up to {DPG_IMAGES} images a prompt, squares, "
                f"got --per-prompt {self.per_prompt} --size {self.size}"
            )


def main() -> int:
    arguments = parse(Arguments, prog="python -m bitdance_jax.evaluate.prompts")
    if arguments.multi_host:
        if not multihost.initialize():
            raise UserError(
                "--multi-host finds no other processes; on each set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            )
        if arguments.mesh == ALL_DEVICES:
            arguments = replace(arguments, mesh=MeshConfig(data=jax.process_count(), tensor=-1))
    with multihost.stop_all_on_error():
        if arguments.multi_host:
            check_same_config(arguments)
        if arguments.compilation_cache is not None:
            keep_compiled(arguments.compilation_cache)
        try:
            draw(arguments)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
    return 0


def draw(arguments: Arguments) -> None:
    """Draws what is not there yet."""
    prompts = (
        read_geneval(arguments.geneval)
        if arguments.geneval is not None
        else read_dpg(arguments.dpg or "")
    )
    model = TextToImage(arguments.checkpoint, mesh=arguments.mesh, weights=arguments.weights)
    _check_lengths(prompts, arguments.checkpoint)
    guidance = arguments.guidance_scale
    if guidance is None:
        guidance = DPG_GUIDANCE if arguments.geneval is None else GENEVAL_GUIDANCE
    sampler = replace(model.sampler, head_steps=arguments.head_steps, guidance_scale=guidance)
    check_size(model.config, *parse_size(arguments.size))
    check_seed(arguments.seed)
    folder = ImageFolder(
        arguments.out, _settings(arguments, prompts, sampler), arguments.per_prompt
    )
    limit = min(arguments.limit or len(prompts), len(prompts))
    with multihost.entered_on_process_0(folder.open()):
        if arguments.geneval is not None and jax.process_index() == 0:
            print(f"note: {geneval_figure(prompts)}", file=sys.stderr)
        drawn = _draw_missing(folder, model, prompts, limit, arguments, sampler)
    if jax.process_index() == 0:
        now = f" ({drawn} drawn now)" if drawn < limit else ""
        print(f"{arguments.per_prompt} images of each of {limit} prompts in {arguments.out}{now}")


def _draw_missing(
    folder: ImageFolder,
    model: TextToImage,
    prompts: list[Prompt],
    limit: int,
    arguments: Arguments,
    sampler: SamplerConfig,
) -> int:
    """Draws and writes those of the first `limit` prompts that are not there; returns how many."""
    at_once = arguments.batch_size * batch_parts(model.mesh)
    groups = {
        start: prompts[start : min(start + at_once, limit)] for start in range(0, limit, at_once)
    }
    finished = {
        start: multihost.on_process_0(functools.partial(folder.finished, group))
        for start, group in groups.items()
    }
    drawn, each, first_host = (
        limit - sum(finished.values()),
        arguments.per_prompt,
        jax.process_index() == 0,
    )
    # Shown once there are images. Until then the model shows its own bar, and none if it refuses what it is asked for.
    counts: dict[str, Any] = {
        "total": limit * each,
        "initial": (limit - drawn) * each,
        "unit": "image",
        "delay": 1e-6,
    }
    with tqdm(**counts, disable=not first_host, dynamic_ncols=True) as bar:
        for start, group in groups.items():
            if finished[start] == len(group):
                continue
            images, show = [], first_host and bar.n == bar.initial
            for drawn_now in _draw_batch(model, prompts, start, at_once, arguments, sampler, show):
                images.append(drawn_now)
                bar.update(len(group) - finished[start])
            multihost.on_process_0(functools.partial(folder.write, group, np.stack(images, axis=1)))
    multihost.on_process_0(folder.wait)
    return drawn


def _draw_batch(
    model: TextToImage,
    prompts: list[Prompt],
    start: int,
    at_once: int,
    arguments: Arguments,
    sampler: SamplerConfig,
    show: bool,
) -> Iterator[UInt8[np.ndarray, "Q H W 3"]]:
    """The first image of each of `at_once` prompts from number `start` on, then the second of each, and so on.

    Always of all of them, also where some are there already or past the limit; past the end the last is drawn again. So programs and
    batches, and with them the rounding, are the same whatever was skipped.
    """
    texts = [prompts[min(i, len(prompts) - 1)].text for i in range(start, start + at_once)]
    options: dict[str, Any] = {
        "size": arguments.size,
        "seed": arguments.seed,
        "sampler": sampler,
        "batch_size": at_once,
    }
    for j in range(arguments.per_prompt):
        yield model.generate(
            texts, first_index=j * STRIDE + start, progress=show and j == 0, **options
        )


def _check_lengths(prompts: list[Prompt], checkpoint: str) -> None:
    """Raises a UserError for a prompt that the model does not take, before its weights are read."""
    tokenizer = PromptTokenizer(epath.Path(checkpoint) / prompt_tokenizer.FOLDER)
    for prompt in prompts:
        try:
            tokenizer.encode(prompt.text, MAX_PROMPT)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from error


def _settings(
    arguments: Arguments, prompts: list[Prompt], sampler: SamplerConfig
) -> dict[str, Any]:
    """All that decides the images."""
    given = repr([(prompt.name, prompt.text, prompt.line) for prompt in prompts])
    height, width = parse_size(arguments.size)
    return {
        "benchmark": "DPG-Bench" if arguments.geneval is None else "GenEval",
        "prompts": hashlib.sha256(given.encode()).hexdigest()[:12],
        "checkpoint": fingerprint(arguments.checkpoint),
        "weights": arguments.weights,
        "size": f"{width}x{height}",
        "seed": arguments.seed,
        "per_prompt": arguments.per_prompt,
        **to_dict(sampler),
    }


if __name__ == "__main__":
    sys.exit(run(main))
