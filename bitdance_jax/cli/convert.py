"""`bitdance convert`: released files to a model folder, and back.

bitdance convert SOURCE OUT [--weights ema|model] [--force]
bitdance convert MODEL_FOLDER OUT --to torch
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import Config, PathName
from bitdance_jax.convert.convert import convert
from bitdance_jax.convert.export import export
from bitdance_jax.errors import ConfigError
from bitdance_jax.pipelines.hub_models import local_folder


@dataclass(frozen=True)
class Arguments(Config):
    """Converts released weights to a model folder, or a model folder to the release's format.

    Attributes:
      source: a released .pt, a tokenizer's .safetensors or ae_*.pt, a text-to-image folder in the
        plain or the diffusers layout, a class-conditional one in the diffusers layout, a Hugging
        Face folder of Qwen3 alone, or a Hugging Face id, OWNER/REPOSITORY with the /FILE or /FOLDER
        of a model in it; with --to torch, a model folder, a finished run, "emoji" or
        "emoji_classes".
      out: the model folder, local or gs://; with --to torch, a .safetensors file, or a new folder
        for a text-to-image or language model.
      weights: of a .pt with both: the exponential moving average, or the raw weights.
      tokenizer: replaces the model's own tokenizer (.pt, .safetensors).
      tokenizer_only: convert only the tokenizer in a model's file or folder.
      to: "jax" for a model folder, "torch" for the release's keys and layouts.
      force: replace a model in OUT.
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
        raise ConfigError(
            "weights, tokenizer and tokenizer_only are for released files; "
            "to='torch' converts a complete model folder",
            "weights",
        )
    else:
        export(local_folder(arguments.source), arguments.out, force=arguments.force)
