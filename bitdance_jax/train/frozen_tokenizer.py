"""Loads the trained tokenizer of a class-conditional run."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from bitdance_jax.config import TokenizerConfig, from_dict
from bitdance_jax.data.tokens import encoder_fingerprint
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io import model_folder_hints, model_lookup
from bitdance_jax.io.model_folder_hints import CONVERT
from bitdance_jax.io.model_lookup import EMBEDDED, UnfinishedRun, is_embedded
from bitdance_jax.io.progress import report
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.train.task import Params


def load_tokenizer(folder: str, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a model folder (of a tokenizer or of a model), of a finished run, or of the
    Hugging Face hub.

    Raises:
      UserError: there is none, its run is not finished, or its sizes are not `config`.
    """
    folder = local_folder(folder)
    if not is_embedded(folder) and not epath.Path(folder).exists():
        raise UserError(f"there is no tokenizer {folder}; {_how_to_get(folder, config)}")
    if isinstance(model_lookup.locate(folder), UnfinishedRun):
        raise UserError(
            f"the tokenizer's run {folder} is not finished: its bits still change; "
            "resume it and let it finish first"
        )
    tokenizer = Tokenizer.load(folder)
    names = [
        f.name
        for f in dataclasses.fields(config)
        if getattr(tokenizer.config, f.name) != getattr(config, f.name)
    ]
    if names:
        settings = ", ".join(
            f"model.tokenizer.{name}={getattr(tokenizer.config, name)}" for name in names
        )
        raise ConfigError(
            f"the tokenizer in {folder} has {_listed(tokenizer.config, names)}, and "
            f"model.tokenizer {_listed(config, names)}; choose another one, or set {settings}",
            "tokenizer",
        )
    return tokenizer


def report_other_tokenizer(folder: str, params: Params, tokenizer: Tokenizer) -> None:
    """Reports if the weights in `folder` were trained on the bits of another tokenizer.

    Args:
      folder: of a class-conditional model.
      params: of its tokenizer.
      tokenizer: of this run.
    """

    def encoder(params: Params) -> str:
        # Exported weights may be rounded.
        rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params["encoder"])
        return encoder_fingerprint(tokenizer.config, {"encoder": rounded})

    if encoder(tokenizer.params) != encoder(params):
        report(
            f"note: the weights of {folder} were trained on the bits of another tokenizer "
            "than that of this run"
        )


def _listed(config: TokenizerConfig, names: list[str]) -> str:
    return ", ".join(f"{name} {getattr(config, name)}" for name in names)


def _how_to_get(folder: str, config: TokenizerConfig) -> str:
    """Advice on making or converting the tokenizer of a folder that does not exist."""
    run = os.path.dirname(os.path.normpath(folder))
    if os.path.basename(os.path.normpath(folder)) == "model" and run:
        workdir = "" if run == "runs/emoji_tokenizer" else f" --run.workdir {run}"
        advice = f"train it first: bitdance train emoji_tokenizer{workdir}"
    elif config == TokenizerConfig.d16c32():
        advice = (
            "it is part of every released ImageNet model: "
            f"{CONVERT} BitDance_B_1x.pt {folder} --tokenizer-only"
        )
    else:
        advice = model_folder_hints.hint(folder)
    embedded = from_dict(TokenizerConfig, model_lookup.read_config(EMBEDDED).config["tokenizer"])
    fits = embedded == config
    return f"{advice}, or use the embedded one: tokenizer={EMBEDDED!r}" if fits else advice
