"""How patches are sampled: solver and guidance of the head (paper 3.2)."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from bitdance_jax.config.plain import (
    Config,
    Count,
    HeadSteps,
    NotNegative,
    OneOf,
    Range,
    Share,
    checked,
    require,
)


SOLVERS: dict[str, Any] = {}
"""Solvers by name; `sampling.solvers` fills the table, and user code may add to it."""

SCHEDULES: dict[str, Any] = {}
"""Guidance schedules by name; `sampling.guidance` fills the table, and user code may add to it."""

SAMPLERS: dict[str, dict[str, Any]] = {"fast": {"solver": "multistep_sde", "head_steps": 12}}
"""Fields of `SamplerConfig` by the names of samplers."""

SamplerName = Annotated[str, OneOf(SAMPLERS)]
SolverName = Annotated[str, OneOf(SOLVERS)]
ScheduleName = Annotated[str, OneOf(SCHEDULES)]


@dataclass(frozen=True)
class SamplerConfig(Config):
    """How the head samples a patch.

    Attributes:
      head_steps: steps of the solver; ignored by heads that need one evaluation.
      solver: name of a solver in `sampling.solvers`; "euler_maruyama" as released.
      guidance_scale: classifier-free guidance scale s; 1 means no guidance.
      guidance_schedule: name of a schedule over the patches in `sampling.guidance`.
      guidance_start, guidance_end: guidance is applied at times of the head in this interval, from
        0 for noise to 1 for data.
      guidance_patch_start, guidance_patch_end: and only at patches in this interval, from 0 for the
        first of an image to 1 for the last.
    """

    head_steps: HeadSteps = 100
    solver: SolverName = "euler_maruyama"
    guidance_scale: NotNegative = 1.0
    guidance_schedule: ScheduleName = "linear"
    guidance_start: Share = 0.0
    guidance_end: Share = 1.0
    guidance_patch_start: Share = 0.0
    guidance_patch_end: Share = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guidance", "guidance_patch"):
            start = getattr(self, f"{name}_start")
            end = getattr(self, f"{name}_end")
            require(
                start <= end,
                f"{name}_end must not be before {name}_start, got {end} and {start}",
                f"{name}_end",
            )

    def named(self, name: str | None) -> "SamplerConfig":
        """The sampler of that name in `SAMPLERS`, with this one's guidance; this one for None.

        Raises:
          ConfigError: there is none.
        """
        if name is None:
            return self
        return dataclasses.replace(self, **SAMPLERS[checked(SamplerName, name, "sampler")])


@dataclass(frozen=True)
class TextSamplerConfig(Config):
    """How a text-to-image model answers in text.

    Attributes:
      max_tokens: of the answer.
      temperature: of the softmax; 0: always the likeliest token.
      top_k: only the likeliest tokens are sampled; None: all.
      top_p: and of those the fewest whose probabilities add up to this.
    """

    max_tokens: Annotated[int, Range(1, 4096)] = 128
    temperature: NotNegative = 1.0
    top_k: Count | None = 1200
    top_p: Annotated[float, Range(1e-6, 1.0)] = 0.95
