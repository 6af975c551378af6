"""Trains small models with other heads and latents for equal steps on the embedded emoji.

    pip install "bitdance_jax[perceptual]"
    python benchmarks/heads.py
    python benchmarks/heads.py --steps 5000 --tokenizer-steps 3000 --width 192 --layers 6

Writes NAME.json and samples of each model, and of all models in `--out` table.md and plot.png: run
again, it trains what is missing, and several processes may share the work. All models have the same
transformer, batches, steps and optimizer. Quality is the Fréchet distance in the 1,280
features of EfficientNet-Lite0 between samples and the held-out images, with their labels; it is not
FID, and small numbers of images bias it upwards by the same amount for all.
"""

import csv
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from lite0 import Lite0

import bitdance_jax
from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import (
    BitwiseHeadConfig,
    FlowHeadConfig,
    HeadConfig,
    RunConfig,
    SamplerConfig,
    TokenClassificationHeadConfig,
    TokenizerConfig,
    from_dict,
)
from bitdance_jax.config.plain import Count, PathName, Seed
from bitdance_jax.configs import emoji_4x, emoji_tokenizer
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.fid.frechet import frechet_distance
from bitdance_jax.fid.statistics import Gaussian, gaussian
from bitdance_jax.io import image_files, model_lookup
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.plot import Panel, line_charts
from bitdance_jax.io.progress import report
from bitdance_jax.models.class_conditional import abstract_params
from bitdance_jax.plan.report import table
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.loop import train


Name = Literal["diffusion", "bitwise", "token_classification", "continuous"]
SIDE = 64


@dataclass(frozen=True)
class Arguments:
    """Comparison of heads.

    Attributes:
      heads: what is compared: the binary diffusion head; the bit-wise one; a softmax for each group
        of 8 bits; the diffusion head on continuous latents.
      steps: of each model.
      tokenizer_steps: of the tokenizer with continuous latents; that of bits is the embedded one.
      batch: images of a step.
      layers, width: of the transformer; the heads have the same width.
      seeds: a model of each.
      guidance: scales that samples are compared at.
      head_steps: of the diffusion heads' solver.
      samples: for each held-out image, with its label.
      out: folder of the results, and of the runs.
    """

    heads: tuple[Name, ...] = ("diffusion", "bitwise", "token_classification", "continuous")
    steps: Count = 300
    tokenizer_steps: Count = 200
    batch: Count = 32
    layers: Count = 3
    width: Count = 128
    seeds: tuple[Seed, ...] = (0,)
    guidance: tuple[float, ...] = (1.5, 3.0, 5.0)
    head_steps: Count = 20
    samples: Count = 4
    out: PathName = "runs/heads"


class Quality:
    """Distances to the held-out images."""

    def __init__(self, images: np.ndarray) -> None:
        self._features = Lite0()
        self._reference = self._gaussian(images)

    def distance(self, images: np.ndarray) -> float:
        return frechet_distance(self._gaussian(images), self._reference)

    def _gaussian(self, images: np.ndarray) -> Gaussian:
        return gaussian(self._features(images))


def continuous_tokenizer(arguments: Arguments) -> str:
    """The folder of a tokenizer of continuous latents, trained unless it is there."""
    config = emoji_tokenizer.get_config("plain", "continuous")
    steps = arguments.tokenizer_steps
    config = dataclasses.replace(
        config,
        image_size=SIDE,
        run=short_run(config.run, Path(arguments.out) / f"tokenizer_{steps}", steps, seed=0),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=steps // 20, ema_decay=0.98),
    )
    train(config.make_task(), config)
    return str(Path(config.run.workdir) / "model")


def short_run(run: RunConfig, workdir: Path, steps: int, seed: int) -> RunConfig:
    return dataclasses.replace(
        run,
        workdir=str(workdir),
        steps=steps,
        seed=seed,
        save_every=steps,
        preview_every=steps,
        compute_dtype="float32",
        export_dtype="float32",
    )


def head_config(name: Name, width: int) -> HeadConfig:
    if name == "bitwise":
        return BitwiseHeadConfig(width)
    if name == "token_classification":
        return TokenClassificationHeadConfig(width, groups=4)
    return FlowHeadConfig(width, num_blocks=3, num_groups=1, head_dim=32)


def training_config(
    arguments: Arguments, name: Name, tokenizer: str, seed: int
) -> ClassConditionalTraining:
    config = emoji_4x.get_config().with_classes_of_data()
    sizes = from_dict(TokenizerConfig, tokenizer_config(tokenizer))
    steps, width = arguments.steps, arguments.width
    model = dataclasses.replace(
        config.model,
        image_size=SIDE,
        tokenizer=sizes,
        transformer=dataclasses.replace(
            config.model.transformer, num_layers=arguments.layers, dim=width, num_heads=width // 32
        ),
        head=head_config(name, width),
    )
    return dataclasses.replace(
        config,
        run=short_run(config.run, Path(arguments.out) / f"{name}_{seed}", steps, seed),
        model=model,
        tokenizer=tokenizer,
        data=dataclasses.replace(config.data, batch_size=arguments.batch),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=steps // 20, ema_decay=0.98),
        preview=SamplerConfig(
            head_steps=arguments.head_steps, guidance_scale=2.0, guidance_schedule="constant"
        ),
    )


def tokenizer_config(folder: str) -> dict[str, Any]:
    config = model_lookup.read_config(folder).config
    return config.get("tokenizer", config)


def trained(config: ClassConditionalTraining) -> dict[str, float]:
    """Trains a model; its held-out loss, and the seconds of a step without compilation."""
    train(config.make_task(), config)
    with open(Path(config.run.workdir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    speeds = [float(row["steps_per_second"]) for row in rows if row.get("steps_per_second")]
    return {
        "held_out_loss": float([row["eval_loss"] for row in rows if row.get("eval_loss")][-1]),
        "seconds_per_step": 1 / float(np.median(speeds)),
    }


def sampled(
    arguments: Arguments, config: ClassConditionalTraining, labels: Sequence[int], quality: Quality
) -> dict[str, Any]:
    """Distances of samples by guidance scale, and the seconds of an image."""
    pipeline = bitdance_jax.load(Path(config.run.workdir) / "model")
    distances, seconds = {}, []
    for scale in arguments.guidance:
        sampler = dataclasses.replace(config.preview, guidance_scale=scale)
        start = time.perf_counter()
        images = pipeline.sample(labels, 1, sampler=sampler, batch_size=len(labels), progress=False)
        seconds.append(time.perf_counter() - start)
        distances[str(scale)] = quality.distance(images)
    # The first call compiles.
    each = min(seconds[1:] or seconds) / len(labels)
    name = Path(config.run.workdir).name
    columns = np.argsort(labels, kind="stable")[:: max(1, len(labels) // 64)][:64]
    image_files.save_png(Path(arguments.out) / f"{name}.png", image_files.grid(images[columns], 16))
    return {"distance": distances, "seconds_per_image": each}


def head_parameters(config: ClassConditionalTraining) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config.model)["head"]))


def write(out: Path) -> None:
    """table.md and plot.png of all results in a folder."""
    results = read_results(out)
    steps, batch = (
        {result["arguments"][name] for result in results.values()} for name in ("steps", "batch")
    )
    rows: list[tuple[str, ...]] = []
    lines, costs = {}, {}
    bounds: dict[str, float] = {}
    for name, result in results.items():
        runs = result["runs"]
        mean = {
            scale: float(np.mean([run["distance"][scale] for run in runs]))
            for scale in runs[0]["distance"]
        }
        milliseconds = 1000 * float(np.mean([run["seconds_per_image"] for run in runs]))
        best = min(mean, key=mean.__getitem__)
        rows.append(
            (
                name,
                f"{runs[0]['head_parameters']:,}",
                f"{np.mean([run['held_out_loss'] for run in runs]):.3f}",
                f"{1000 * np.mean([run['seconds_per_step'] for run in runs]):.1f}",
                f"{mean[best]:.1f} (at {best})",
                f"{milliseconds:.0f}",
            )
        )
        lines[name] = [(float(scale), value) for scale, value in mean.items()]
        costs[name] = [(milliseconds, mean[best])]
        bounds |= result["bound"]
    rows += [(name, "", "", "", f"{value:.1f}", "") for name, value in bounds.items()]
    head = ["", "parameters", "held-out loss", "ms a step", "distance (guidance)", "ms an image"]
    chart = line_charts(
        f"{'/'.join(map(str, steps))} steps of {'/'.join(map(str, batch))} emoji",
        [
            Panel("guidance scale", lines, "Fréchet distance, EfficientNet-Lite0"),
            Panel("ms to sample an image", costs, "the same, at the best scale"),
        ],
        columns=2,
    )
    with replace_file(out / "table.md") as temporary:
        temporary.write_text("\n".join(table(head, rows)) + "\n")
    image_files.save_png(out / "plot.png", chart)
    print("\n".join(table(head, rows)))


def read_results(out: Path) -> dict[str, Any]:
    """By the head's name, in the order of `Name`."""
    files = {name: out / f"{name}.json" for name in get_args(Name)}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def main() -> None:
    arguments = parse(Arguments, sys.argv[1:])
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    _, held_out = emoji_4x.get_config().data.open_splits()
    records = [held_out[i] for i in range(len(held_out))]
    originals = np.stack([centre_crop(record["image"], SIDE) for record in records])
    labels = [int(record["label"]) for record in records] * arguments.samples
    quality = Quality(originals)
    for name in arguments.heads:
        if (out / f"{name}.json").exists():
            continue
        is_continuous = name == "continuous"
        tokenizer = continuous_tokenizer(arguments) if is_continuous else model_lookup.EMBEDDED
        bound = f"held-out images, {'continuous' if is_continuous else 'binary'} tokenizer"
        loaded = bitdance_jax.Tokenizer.load(tokenizer)
        reconstructed = loaded.decode(loaded.encode(originals))
        result: dict[str, Any] = {
            "arguments": dataclasses.asdict(arguments),
            "device": jax.devices()[0].device_kind,
            "bound": {bound: quality.distance(reconstructed)},
            "runs": [],
        }
        for seed in arguments.seeds:
            config = training_config(arguments, name, tokenizer, seed)
            report(f"{name}, seed {seed}")
            run = trained(config) | {"head_parameters": head_parameters(config)}
            result["runs"].append(run | sampled(arguments, config, labels, quality))
        with replace_file(out / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    write(out)


if __name__ == "__main__":
    sys.exit(run(main))
