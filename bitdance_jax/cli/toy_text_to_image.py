"""`bitdance toy-text-to-image`: a text-to-image model folder at toy size."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import Config, PathName, Range, Seed
from bitdance_jax.pipelines.toy_text_to_image import config, save


@dataclass(frozen=True)
class Arguments(Config):
    """Writes a toy text-to-image model folder with random weights.

    Attributes:
      out: the folder.
      tokens_per_step: P, a square number.
      seed: of the weights.
      force: replace the model that is in the folder already.
    """

    out: Annotated[PathName, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    tokens_per_step: Annotated[int, Range(1, 4096)] = 4
    seed: Seed = 0
    force: bool = False


def main() -> None:
    arguments = parse(Arguments)
    save(arguments.out, config(arguments.tokens_per_step), arguments.seed, force=arguments.force)
    print(f"{arguments.out}: text_to_image model with random weights")
