"""A model folder to a state dict of the release, as a .safetensors file."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from bitdance_jax import model_folder
from bitdance_jax.config import ClassConditionalConfig, TokenizerConfig, from_dict
from bitdance_jax.convert import keys, parameters, sizes
from bitdance_jax.convert.sources import OWN_RECORD
from bitdance_jax.errors import UserError
from bitdance_jax.models import class_conditional
from bitdance_jax.tokenizer import autoencoder


def export(folder: str, out: str) -> None:
    """Writes the model of a model folder as the .safetensors file `out`, with the release's keys and layouts.

    A class-conditional model's tokenizer lies under `vae.`, as in the released files; a tokenizer gets its `*_config.json` beside it. The
    dtype is the folder's. `convert` turns the file into the same folder again, config and metadata with it.

    Raises:
      UserError: not a model folder, or no place for the file.
    """
    target = Path(out)
    if "://" in out or target.suffix != ".safetensors":
        raise UserError(f"--to torch writes a local .safetensors file, got {out}; name it NAME.safetensors")
    saved = model_folder.load(folder)
    own = json.dumps({"config": saved.config, "metadata": saved.metadata})
    state, record = _state(folder, saved)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.new")
        safetensors.numpy.save_file(state, temporary, metadata={"format": "pt", OWN_RECORD: own})
        if saved.kind == "tokenizer":
            config = temporary.with_suffix(".json")
            config.write_text(json.dumps(record, indent=2) + "\n")
            os.replace(config, target.with_name(f"{target.stem}_config.json"))
        os.replace(temporary, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{out} cannot be written ({error})") from error
    print(f"{out}: {len(state)} tensors, {sum(array.nbytes for array in state.values()) / 2**30:.2f} GiB")


def _state(folder: str, saved: model_folder.ModelFolder) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The release's state dict and arguments."""
    where = f"{folder}/config.json: config"
    if saved.kind == "tokenizer":
        config = from_dict(TokenizerConfig, saved.config, where)
        model_folder.check_shapes(folder, saved.params, autoencoder.abstract_params(config))
        return parameters.to_release(saved.params, keys.TOKENIZER), sizes.tokenizer_record(config)
    model_config = from_dict(ClassConditionalConfig, saved.config, where)
    model = class_conditional.abstract_params(model_config)
    model_folder.check_shapes(folder, saved.params, {"model": model, "tokenizer": autoencoder.abstract_params(model_config.tokenizer)})
    tokenizer = parameters.to_release(saved.params["tokenizer"], keys.TOKENIZER)
    state = parameters.to_release(saved.params["model"], keys.class_conditional(model_config))
    return state | {f"vae.{key}": array for key, array in tokenizer.items()}, sizes.class_conditional_record(model_config)
