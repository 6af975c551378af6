r"""`bitdance sweep`: the score over guidance scale and head steps.

    bitdance sweep --checkpoint MODEL --guidance 2.5,3.0,3.5 --head-steps 10,25,50 \
        --num-images 10000 --inception pt_inception-2015-12-05-6726825d.pth \
        --reference VIRTUAL_imagenet256_labeled.npz
    bitdance sweep --guidance 1,2,4 --head-steps 10,25 --num-images 500

The score of the first is FID. Without --inception, as in the second, it is a distance of the
model's own features, which only compares settings of this model.
"""

import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import BatchSize, Config, PathName, Range
from bitdance_jax.errors import ConfigError
from bitdance_jax.evaluate.sampler_sweep import Setting, Table, load_model, plot_scores, sweep
from bitdance_jax.io import image_files
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.io.model_lookup import EMBEDDED, EMBEDDED_CLASSES
from bitdance_jax.io.paths import check_suffix
from bitdance_jax.pipelines.hub_models import local_folder


@dataclass(frozen=True)
class Arguments(Config):
    """Scores the images of every pair of guidance scale and head steps against real images.

    All pairs use the same seed. The same command resumes: rows in the table are not computed again.
    Only one process at a time may write a table.

    Attributes:
      checkpoint: model folder, local or gs://, "emoji_classes", or a Hugging Face id.
      guidance: scales, separated by commas; default: the model's.
      head_steps: numbers of steps, separated by commas; default: the model's.
      num_images: images of each pair, balanced over the classes.
      seed: of the images.
      inception: weights of the FID Inception-v3, as for `bitdance evaluate`; without them the
        score is of the model's own features.
      reference: the real images: with --inception as for `bitdance evaluate`, otherwise a folder;
        "emoji": the embedded training images.
      out: the table; the plot gets the same name with the ending .png.
      batch_size: images generated at a time on each device.
      dtype: of weights and activations.
    """

    checkpoint: PathName = EMBEDDED_CLASSES
    guidance: str | None = None
    head_steps: str | None = None
    num_images: Annotated[int, Range(2, 10**8)] = 1000
    seed: int = 0
    inception: PathName | None = None
    reference: PathName = EMBEDDED
    out: PathName = "sweep.csv"
    batch_size: BatchSize = 24
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_suffix(self.out, ".csv", "out")
        self.setting()

    def setting(self) -> Setting:
        return Setting(**{field.name: getattr(self, field.name) for field in fields(Setting)})


def main() -> int:
    arguments = parse(Arguments)
    scales = parse_numbers(arguments.guidance, float, "guidance", "2.5,3.0,3.5")
    steps = parse_numbers(arguments.head_steps, int, "head_steps", "10,25,50")
    setting = replace(arguments.setting(), checkpoint=local_folder(arguments.checkpoint))
    image = Path(arguments.out).with_suffix(".png")
    image_files.check_writable(image)
    keep_compiled()
    with writer_lock(arguments.out, is_folder=False):
        table = Table(arguments.out)
        model = load_model(setting)
        try:
            samplers, scores = sweep(setting, model, table, scales=scales, head_steps=steps)
        except KeyboardInterrupt:
            print("stopped; the same command resumes", file=sys.stderr)
            return 130
        plot_scores(image, setting, samplers, scores)
    best = samplers[int(np.argmin(scores))]
    print(
        f"lowest {setting.score}: {min(scores):.4g} with guidance {best.guidance_scale:g} "
        f"and {best.head_steps} head steps"
    )
    print(f"table in {arguments.out}, plot in {image}")
    return 0


def parse_numbers(text: str | None, kind: Any, field: str, example: str) -> list[Any]:
    """The numbers of a list separated by commas, without duplicates."""
    if text is None:
        return []
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(
            f"{field} must be numbers separated by commas, such as {example}, got {text!r}", field
        )
    return list(dict.fromkeys(numbers))
