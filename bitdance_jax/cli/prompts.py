r"""`bitdance evaluate-prompts`: the images that benchmarks of prompts score.

    bitdance evaluate-prompts --checkpoint MODEL --out geneval \
        --geneval evaluation_metadata_long.jsonl
    bitdance evaluate-prompts --checkpoint MODEL --out dpg --dpg dpg_bench/prompts
    bitdance evaluate-prompts --checkpoint MODEL --out oneig --oneig OneIG-Bench.csv
    bitdance evaluate-prompts --checkpoint MODEL --out tiif --tiif data/testmini_prompts

The benchmark's own scorer then reads the folder.
"""

import sys
from dataclasses import dataclass, replace
from typing import Annotated

from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.cli.processes import together
from bitdance_jax.config import MeshConfig
from bitdance_jax.config.plain import BatchSize, Config, Count, HeadSteps, PathName, Range, Seed
from bitdance_jax.config.sampler import SamplerName
from bitdance_jax.errors import ConfigError
from bitdance_jax.evaluate.prompt_images import (
    MAX_IMAGES,
    MAX_PER_PROMPT,
    Benchmark,
    Setting,
    generate_images,
)
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.pipelines.text_to_image import ALL_DEVICES
from bitdance_jax.pipelines.weights import WeightType


@dataclass(frozen=True)
class Arguments(Config):
    """Generates the images of the prompts of GenEval, DPG-Bench, OneIG-Bench or TIIF-Bench.

    The same command resumes: prompts whose files are complete are skipped. OUT.settings.json
    records the settings.

    Attributes:
      checkpoint: text-to-image model folder, local or gs://, or a Hugging Face id.
      out: the folder.
      geneval: evaluation_metadata_long.jsonl, the rewritten prompts of the released results,
        GenEval's own evaluation_metadata.jsonl, or lines like theirs: objects with a "prompt".
      dpg: DPG-Bench's folder of ID.txt, or a .json of {id: prompt}.
      oneig: OneIG-Bench.csv, or OneIG-Bench-ZH.csv for the Chinese prompts.
      tiif: TIIF-Bench's data/test_prompts or data/testmini_prompts, or one .jsonl of them.
      name: of the model in the folders of OneIG-Bench and TIIF-Bench; default: its folder's.
      size: WIDTHxHEIGHT in pixels.
      seed: image j of prompt i depends on seed, i and j alone, up to rounding.
      per_prompt: images of each prompt; default: 4, for TIIF-Bench 1.
      guidance_scale: default: 13.0 for GenEval, 7.5 for the others.
      sampler: "fast": a solver of the second order with 12 steps.
      head_steps: N of the head's solver; default: 50, or those of the sampler.
      limit: only the first prompts; a later run may raise it.
      batch_size: images generated at a time by each copy of the model (--mesh.data times
        --mesh.fsdp), each of another prompt.
      weights: the type of the weights in memory.
      mesh: the devices; default: each layer is sharded over all, with --multi-host over those of a
        host.
      compilation_cache: folder, local or gs://, for compiled programs, which makes the next start
        faster; default: for one process a folder in the user's cache. Of several hosts only the
        first writes, and all read.
      multi_host: this is one of several processes, on as many hosts, that generate together
        (bitdance_jax/distributed/multihost.py); all get the same flags, and process 0 writes.
    """

    checkpoint: PathName
    out: PathName
    geneval: PathName | None = None
    dpg: PathName | None = None
    oneig: PathName | None = None
    tiif: PathName | None = None
    name: str | None = None
    size: str = "1024x1024"
    seed: Seed = 0
    per_prompt: Annotated[int, Range(1, MAX_PER_PROMPT)] | None = None
    guidance_scale: float | None = None
    sampler: SamplerName | None = None
    head_steps: HeadSteps | None = None
    limit: Count | None = None
    batch_size: BatchSize = 4
    weights: WeightType | None = None
    mesh: MeshConfig = ALL_DEVICES
    compilation_cache: PathName | None = None
    multi_host: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self._given) != 1:
            raise ConfigError(
                "give one of --geneval evaluation_metadata_long.jsonl, --dpg PROMPTS, a folder of "
                "ID.txt or a .json, --oneig OneIG-Bench.csv and --tiif data/testmini_prompts"
            )
        self.setting()

    @property
    def _given(self) -> dict[Benchmark, str]:
        """The prompts of each benchmark that is given."""
        prompts: dict[Benchmark, str | None] = {
            "GenEval": self.geneval,
            "DPG-Bench": self.dpg,
            "OneIG-Bench": self.oneig,
            "TIIF-Bench": self.tiif,
        }
        return {name: path for name, path in prompts.items() if path is not None}

    def setting(self, mesh: MeshConfig | None = None) -> Setting:
        ((benchmark, prompts),) = self._given.items()
        return Setting(
            benchmark=benchmark,
            prompts=prompts,
            checkpoint=self.checkpoint,
            out=self.out,
            name=self.name,
            size=self.size,
            seed=self.seed,
            per_prompt=self.per_prompt or min(4, MAX_IMAGES.get(benchmark, 4)),
            guidance_scale=self.guidance_scale,
            sampler=self.sampler,
            head_steps=self.head_steps,
            limit=self.limit,
            batch_size=self.batch_size,
            weights=self.weights,
            mesh=mesh or self.mesh,
        )


def main() -> int:
    arguments = parse(Arguments)
    with together(arguments, arguments.multi_host) as processes:
        mesh = arguments.mesh
        if processes > 1 and mesh == ALL_DEVICES:
            mesh = MeshConfig(data=processes, tensor=-1)
        keep_compiled(arguments.compilation_cache)
        try:
            checkpoint = local_folder(arguments.checkpoint)
            generate_images(replace(arguments.setting(mesh), checkpoint=checkpoint))
        except KeyboardInterrupt:
            print("stopped; the same command resumes", file=sys.stderr)
            return 130
    return 0
