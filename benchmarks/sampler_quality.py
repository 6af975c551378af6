"""Compares solvers of the head at equal numbers of evaluations, on any model with embedded images.

    pip install "bitdance_jax[perceptual]"
    python benchmarks/sampler_quality.py                                # the embedded model
    python benchmarks/sampler_quality.py --model emoji_classes
    python benchmarks/sampler_quality.py --minutes 3 --batch-size 500   # a GPU for three minutes
    python benchmarks/sampler_quality.py --images 64 --head-images 4    # a CPU

For each setting it measures

- the Fréchet distance between samples and all embedded images in EfficientNet-Lite0's features.
  Captions or classes are drawn as in the data, and all settings start from the same noise;
- of the head alone, how near the bits come to those of 200 steps of the released solver: both
  sample each patch after the same preceding tokens, those that the 200 steps have sampled, and with
  the same path of the noise. Beside the share of equal bits stands the mean squared difference of
  the bits' probabilities, estimated without bias from two noises; it compares distributions, so
  that it is fair to solvers of the ODE too;
- last, how many evaluations a patch takes that stops when no bit of the prediction has changed its
  sign for some evaluations, and its equal bits.

Settings are measured in the order of their worth until the time is up, and each is written when it
is finished; the same command resumes. Writes results.json, table.md and plot.png into `--out`.
"""

import dataclasses
import functools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8
from lite0 import Lite0
from tabulated_solvers import Tabulated, draw, mixing, redraw, stopped_after, tabulated
from tqdm import tqdm

import bitdance_jax
from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import SamplerConfig
from bitdance_jax.config.plain import BatchSize, Config, Count, PathName, Positive, Seed
from bitdance_jax.data.emoji import EmojiArchive
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.fid.frechet import frechet_distance
from bitdance_jax.fid.statistics import gaussian
from bitdance_jax.heads.protocols import Solver
from bitdance_jax.io import image_files
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.io.plot import Panel, line_charts
from bitdance_jax.models.class_conditional import ClassConditional
from bitdance_jax.models.text_to_image import TextToImage
from bitdance_jax.pipelines.pipeline import Pipeline
from bitdance_jax.pipelines.programs import Programs, read_labels, read_prompts
from bitdance_jax.plan.report import table
from bitdance_jax.sampling.guidance import make_guidance
from bitdance_jax.sampling.solvers import make_solver


FINE = 200
"""Steps of the released solver that the head's bits are compared with."""


class Setting(NamedTuple):
    """What is measured.

    Attributes:
      solver, steps: its name, and the number of its steps.
      shift: of its times, beside that of the head; below 1 they are later.
      seed: is added to that of the arguments.
    """

    solver: str
    steps: int
    shift: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        shift = f", shift {self.shift:g}" if self.shift != 1 else ""
        return f"{self.solver} {self.steps}{shift}" + (f", seed + {self.seed}" if self.seed else "")


SETTINGS = (
    Setting("euler_maruyama", 50),
    Setting("multistep_sde", 12),
    Setting("euler_maruyama", 11),
    Setting("multistep_sde", 8),
    Setting("euler_maruyama", 7),
    Setting("multistep_ode", 12),
    Setting("euler_maruyama", 50, seed=1),
    Setting("multistep_sde", 12, seed=1),
    Setting("multistep_sde", 6),
    Setting("euler_maruyama", 5),
    Setting("euler_maruyama", 24),
    Setting("multistep_sde", 25),
    Setting("multistep_sde", 16),
    Setting("multistep_sde", 12, shift=0.6),
    Setting("multistep_sde", 12, shift=1.6),
    Setting("multistep_ode", 8),
    Setting("euler", 12),
    Setting("euler", 50),
    Setting("multistep_sde", 4),
    Setting("euler_maruyama", 3),
    Setting("euler_maruyama", 100),
    Setting("multistep_sde", 50),
)
"""In the order of their worth."""

STOPPED = (Setting("multistep_sde", 12), Setting("multistep_sde", 25))
"""Whose patches are stopped when no bit has changed its sign for `PATIENCE` evaluations."""

PATIENCE = (1, 2, 3, 4)


@dataclass(frozen=True)
class Arguments(Config):
    """Judge of the head's solvers.

    Attributes:
      model: a model folder or a Hugging Face id, whose prompts are the captions of the embedded
        images, or whose classes are their groups or subgroups.
      images: samples of each setting for the Fréchet distance.
      head_images: samples whose bits are compared.
      guidance_scale: default: the model's.
      seed: of the samples.
      batch_size: images that are sampled at a time.
      minutes: no setting is started after these; default: all are measured.
      out: folder of the results.
    """

    model: PathName = EMBEDDED
    images: Count = 3000
    head_images: Count = 64
    guidance_scale: float | None = None
    seed: Seed = 0
    batch_size: BatchSize = 256
    minutes: Positive | None = None
    out: PathName = "runs/sampler_quality"


def last_evaluation(signs: Int8[np.ndarray, "E N B P K"], patience: int) -> Int[np.ndarray, "N B"]:
    """The first evaluation of each patch at which no bit has changed for `patience` evaluations."""
    changed = np.any(signs[1:] != signs[:-1], axis=(-2, -1))
    last = np.full(changed.shape[1:], len(signs) - 1)
    for i in reversed(range(patience, len(signs))):
        last = np.where(changed[i - patience : i].any(axis=0), last, i)
    return last


class Judge:
    """A model with its prompts or labels, and what its samples are compared with."""

    def __init__(self, arguments: Arguments) -> None:
        pipeline = bitdance_jax.load(arguments.model)
        sampler = pipeline.sampler
        if arguments.guidance_scale is not None:
            sampler = dataclasses.replace(sampler, guidance_scale=arguments.guidance_scale)
        self._arguments = arguments
        self._pipeline = pipeline
        self._sampler = sampler
        self._programs = Programs(pipeline.config, pipeline.mesh, pipeline.dtype)
        self._archive = EmojiArchive()
        self._subjects = subjects(pipeline, self._archive)
        config: Any = pipeline.config
        if pipeline.kind == "text_to_image":
            model: Any = TextToImage(config, dtype=pipeline.dtype)
            read: Any = functools.partial(read_prompts, model)
        else:
            model = ClassConditional(config, dtype=pipeline.dtype)
            read = functools.partial(read_labels, model)
        self._draw = jax.jit(functools.partial(draw, read))
        self._redraw = jax.jit(functools.partial(redraw, read))
        self._fine = self._solver(Setting("euler_maruyama", FINE))

    @functools.cached_property
    def _real(self) -> Any:
        """The real images' features."""
        archive, side = self._archive, self._pipeline.default_size[0]
        images = [centre_crop(archive.image(i), side) for i in range(len(archive.records))]
        self._features = Lite0()
        return gaussian(self._features(np.stack(images), "features of the real images"))

    def __call__(self, setting: Setting) -> dict[str, float]:
        """All measures of a setting, and the seconds that they took."""
        start = time.monotonic()
        measures = {"evaluations": self._solver(setting).num_evaluations, **self.head(setting)}
        measures["distance"] = self.distance(setting)
        return measures | {"seconds": time.monotonic() - start}

    def distance(self, setting: Setting) -> float:
        """Between `images` samples and the real images."""
        real = self._real
        capacity = max(self._solver(each).num_evaluations for each in SETTINGS)
        solver = tabulated(self._solver(setting), capacity)
        images = [
            np.asarray(self._decode(values, keys))
            for values, keys in self._samples(solver, self._arguments.images, setting.seed)
        ]
        samples = np.concatenate(images)[: self._arguments.images]
        return frechet_distance(gaussian(self._features(samples)), real)

    def head(self, setting: Setting) -> dict[str, float]:
        """The bits of patches given the fine solver's preceding ones, against the fine solver's."""
        solver = self._solver(setting)
        pairs = [(self._redrawn(solver, seed), fine) for seed, fine in enumerate(self._fine_bits)]
        first, second = ((a - b).astype(np.float64) / 2 for a, b in pairs)
        return {
            "equal_bits": float(np.mean([a == b for a, b in pairs])),
            "equal_bits_first_patch": float(np.mean([a[0] == b[0] for a, b in pairs])),
            "probability_error": float(np.mean(first * second)),
        }

    def independent(self) -> float:
        """The share of equal bits of two draws of the fine solver."""
        first, second = self._fine_bits
        return float(np.mean(first == second))

    def stopped(self, setting: Setting) -> list[dict[str, float]]:
        """Of patches that stop when no bit has changed its sign for each of `PATIENCE`."""
        solver = self._solver(setting)
        count = solver.num_evaluations
        signs = np.stack([self._redrawn(solver, 0, evaluations=n + 1) for n in range(count)])
        bits = self._fine_bits[0]
        result = []
        for patience in PATIENCE:
            last = last_evaluation(signs, patience)
            found = np.take_along_axis(signs, last[None, ..., None, None], 0)[0]
            result.append(
                {
                    "patience": patience,
                    "evaluations": float(last.mean() + 1),
                    "evaluations_of_a_batch": float(last.max(axis=1).mean() + 1),
                    "equal_bits": float(np.mean(found == bits)),
                }
            )
        return result

    def _solver(self, setting: Setting) -> Any:
        config = SamplerConfig(solver=setting.solver, head_steps=setting.steps)
        shift = self._pipeline.config.head.time_shift
        return make_solver(config, None if shift is None else shift * setting.shift)

    @functools.cached_property
    def _context(self) -> tuple[Any, Any, Float[Array, "N B P K"]]:
        """Inputs, scales and the values of images that the fine solver has sampled."""
        solver = tabulated(self._fine, self._fine.num_evaluations)
        request = self._request(self._arguments.head_images, 0)
        inputs, keys = request.batch(0)
        scales = self._scales(solver, request.num_patches)
        return inputs, scales, self._draw(self._params, inputs, keys, scales, solver)

    @functools.cached_property
    def _fine_bits(self) -> list[Int8[np.ndarray, "N B P K"]]:
        """From two noises."""
        return [self._redrawn(self._fine, seed) for seed in (0, 1)]

    def _redrawn(
        self, solver: Solver, seed: int, evaluations: int | None = None
    ) -> Int8[np.ndarray, "N B P K"]:
        """Bits of all patches, each sampled after the preceding ones of the context.

        With a number of evaluations they are the signs of the last one's prediction.
        """
        inputs, scales, values = self._context
        padded = tabulated(solver, self._fine.num_evaluations)
        if evaluations is not None:
            padded = stopped_after(padded, evaluations)
        mixed = mixing(np.asarray(solver.times()), np.asarray(self._fine.times()))
        unused = padded.num_evaluations - len(mixed)
        padded = padded._replace(mixing=jnp.pad(mixed, ((0, unused), (0, 0))))
        _, keys = self._request(self._arguments.head_images, seed).batch(0)
        redrawn = self._redraw(self._params, inputs, keys, scales, padded, values)
        return np.where(np.asarray(redrawn) > 0, np.int8(1), np.int8(-1))

    @property
    def _params(self) -> Any:
        return self._pipeline.params["model"]

    def _request(self, images: int, seed: int) -> Any:
        rows = np.random.default_rng(self._arguments.seed).permutation(len(self._subjects))
        chosen = [self._subjects[rows[i % len(rows)]] for i in range(images)]
        options: Any = (1, None, self._sampler, None, None, self._arguments.batch_size, 0)
        return self._pipeline._request(chosen, self._arguments.seed + seed, *options, shrink=True)

    def _scales(self, solver: Tabulated, num_patches: int) -> Any:
        guidance = make_guidance(self._sampler)
        return (
            None if guidance is None else guidance.scales(num_patches, np.asarray(solver.steps.t))
        )

    def _samples(self, solver: Tabulated, images: int, seed: int) -> Any:
        request = self._request(images, seed)
        scales = self._scales(solver, request.num_patches)
        for start in request.starts:
            inputs, keys = request.batch(start)
            yield self._draw(self._params, inputs, keys, scales, solver), keys

    def _decode(self, values: Float[Array, "N B P K"], keys: Any) -> UInt8[Array, "B H W C"]:
        height = self._pipeline.default_size[0] // self._pipeline.config.tokenizer.downsampling
        codes = self._programs.to_codes(values, np.int32(len(values)), height=height)
        return self._programs.decode(self._pipeline.params["tokenizer"], codes, keys)


def subjects(pipeline: Pipeline, archive: EmojiArchive) -> list[str]:
    """The caption or class of every embedded image."""
    if pipeline.kind == "text_to_image":
        return [record["text"] for record in archive.records]
    for field in ("subgroup", "group"):
        names = [record[field] for record in archive.records]
        if set(names) <= set(pipeline.class_names):
            return names
    raise UserError(
        "the classes of the model are neither the groups nor the subgroups of the embedded images, "
        f"but such as {pipeline.class_names[0]!r}"
    )


class Results:
    """results.json, which is written after each setting, table.md and plot.png."""

    def __init__(self, arguments: Arguments) -> None:
        self._out = Path(arguments.out)
        self._path = self._out / "results.json"
        asked = dataclasses.asdict(arguments)
        del asked["minutes"], asked["out"]
        self.content: dict[str, Any] = {
            "arguments": asked,
            "device": jax.devices()[0].device_kind,
            "settings": {},
            "stopped": {},
        }
        if self._path.exists():
            found = json.loads(self._path.read_text())
            if found.get("arguments") != asked:
                raise FileError(
                    f"{self._path} was written with other arguments; choose another --out",
                    self._path,
                )
            self.content = found

    def write(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        with replace_file(self._path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=2) + "\n")

    def show(self) -> None:
        """Writes the table and the plot, and prints the table."""
        settings = self.content["settings"]
        if not settings:
            return
        head = [
            "solver, steps",
            "evaluations",
            "Fréchet distance",
            "equal bits, %",
            "of the first patch, %",
            "error of probabilities, 1e-4",
            "seconds",
        ]
        rows = [
            (
                name,
                str(found["evaluations"]),
                f"{found['distance']:.2f}",
                f"{100 * found['equal_bits']:.2f}",
                f"{100 * found['equal_bits_first_patch']:.2f}",
                f"{1e4 * found['probability_error']:.2f}",
                f"{found['seconds']:.0f}",
            )
            for name, found in settings.items()
        ]
        lines = "\n".join([*table(head, rows), "", *self._stopped_table()])
        with replace_file(self._out / "table.md") as temporary:
            temporary.write_text(lines + "\n")
        panels = [self._panel("distance", "distance in features of EfficientNet-Lite0")]
        panels.append(self._panel("equal_bits", f"bits equal to those of {FINE} steps"))
        title = f"{self.content['arguments']['model']}, {self.content['device']}"
        image_files.save_png(self._out / "plot.png", line_charts(title, panels, columns=2))
        print(lines)
        print(f"two draws of {FINE} steps have {self.content['independent']:.2%} equal bits")

    def _stopped_table(self) -> list[str]:
        head = ["", "patience", "evaluations", "of the slowest patch of a batch", "equal bits, %"]
        rows = [
            (
                name,
                str(row["patience"]),
                f"{row['evaluations']:.1f}",
                f"{row['evaluations_of_a_batch']:.1f}",
                f"{100 * row['equal_bits']:.2f}",
            )
            for name, found in self.content["stopped"].items()
            for row in found
        ]
        return table(head, rows) if rows else []

    def _panel(self, field: str, title: str) -> Panel:
        lines: dict[str, list[tuple[float, float]]] = {}
        for found in self.content["settings"].values():
            if not found["seed"] and found["shift"] == 1:
                points = lines.setdefault(found["solver"], [])
                points.append((found["evaluations"], found[field]))
        return Panel("evaluations of the head for a patch", lines, title)


def main() -> None:
    start = time.monotonic()
    arguments = parse(Arguments)
    results = Results(arguments)
    found, stopped = results.content["settings"], results.content["stopped"]
    missing = [setting for setting in SETTINGS if setting.name not in found]
    not_stopped = [setting for setting in STOPPED if setting.name not in stopped]
    judge = Judge(arguments) if missing or not_stopped else None
    bar = tqdm([*missing, *not_stopped], "settings", unit="setting")
    for number, setting in enumerate(bar):
        assert judge is not None
        if arguments.minutes is not None and time.monotonic() - start > 60 * arguments.minutes:
            bar.write("the time is up; the same command goes on with the next setting")
            break
        bar.set_postfix_str(setting.name)
        if number < len(missing):
            found[setting.name] = setting._asdict() | judge(setting)
            results.content["independent"] = judge.independent()
        else:
            stopped[setting.name] = judge.stopped(setting)
        results.write()
    results.show()


if __name__ == "__main__":
    sys.exit(run(main))
