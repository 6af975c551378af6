"""Released files to model folders and back: `python -m bitdance_jax.convert SOURCE OUT [--weights ema|model] [--to torch] [--force]`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import Config, PathName
from bitdance_jax.convert.convert import convert
from bitdance_jax.convert.export import export
from bitdance_jax.errors import UserError


@dataclass(frozen=True)
class Arguments(Config):
    """Converts released BitDance weights to a model folder, or a model folder to a state dict of the release.

    Attributes:
      source: a released .pt, a tokenizer's .safetensors or ae_*.pt, a text-to-image folder in the plain or the diffusers layout, or a
        Hugging Face id, owner/repository or owner/repository/file; with --to torch, a model folder.
      out: the model folder, local or gs://; with --to torch, a .safetensors file, or a text-to-image model's new folder.
      weights: of a .pt that has both: the averaged ones, or the raw ones.
      tokenizer: take this tokenizer (.pt, .safetensors) instead of the model's own.
      tokenizer_only: convert only the tokenizer that lies in a model's file or folder.
      to: "jax" for a model folder, "torch" for the release's keys and layouts.
      force: replace the model that is in OUT already.
    """

    source: Annotated[PathName, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    out: Annotated[PathName, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    weights: Literal["ema", "model"] = "ema"
    tokenizer: PathName | None = None
    tokenizer_only: bool = False
    to: Literal["jax", "torch"] = "jax"
    force: bool = False


def main() -> None:
    arguments = parse(Arguments)
    if arguments.to == "jax":
        convert(
            arguments.source,
            arguments.out,
            weights=arguments.weights,
            tokenizer=arguments.tokenizer,
            tokenizer_only=arguments.tokenizer_only,
            force=arguments.force,
        )
    elif arguments.tokenizer is not None or arguments.tokenizer_only or arguments.weights != "ema":
        flags = "--weights, --tokenizer and --tokenizer-only"
        raise UserError(
            f"{flags} are for released files; --to torch takes the model folder as it is"
        )
    else:
        export(arguments.source, arguments.out, force=arguments.force)
