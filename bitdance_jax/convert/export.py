"""Exports a model folder in the form of the release: a .safetensors file, or a folder."""

import json
from pathlib import Path
from typing import Any

import tqdm
from etils import epath

from bitdance_jax.config import (
    ClassConditionalConfig,
    Qwen3Config,
    TextToImageConfig,
    TokenizerConfig,
    from_dict,
)
from bitdance_jax.convert import (
    keys,
    parameters,
    release_folder,
    released_configs,
    released_text_to_image,
    safetensors_file,
)
from bitdance_jax.convert.parameters import Tensors
from bitdance_jax.convert.sources import INNER_TOKENIZER, OWN_RECORD
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.io import atomic, model_folder, model_lookup, paths
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.manifest import IN_WORDS
from bitdance_jax.io.model_folder import ModelFolder
from bitdance_jax.models import class_conditional, text_to_image
from bitdance_jax.text import prompt_tokenizer
from bitdance_jax.tokenizer import autoencoder
from bitdance_jax.transformer import qwen3


SHARD_BYTES = 5 * 10**9
"""Size of the shards of a language model, as on Hugging Face."""


def export(folder: str, out: str, *, force: bool = False) -> None:
    """Writes a model with the release's keys and layouts, one tensor in memory at a time.

    The keys of a class-conditional model's tokenizer start with `vae.`, as in the released files. A
    `*_config.json` beside the file has the released config of a tokenizer, or the release's
    arguments of a class-conditional model. Dtypes do not change. `convert` turns the result into
    the same model folder, with its config and metadata.

    Args:
      folder: any model folder, a finished run, or "emoji" or "emoji_classes".
      out: a .safetensors file, or a new folder for a text-to-image model (in the plain layout) or a
        language model.
      force: replace an existing file.

    Raises:
      ConfigError: `out` is remote, or a file for a text-to-image model, or no .safetensors for
        another one.
      FileError: `folder` is not a model folder or a finished run, or `out` exists or cannot be
        written.
    """
    found = model_lookup.locate(folder)
    if isinstance(found, model_lookup.UnfinishedRun):
        raise FileError(f"the run {folder} is not finished; only its final model can be exported")
    folder = str(found)
    saved = model_folder.load(folder, read_array=lambda _, array: array)
    if "://" in out:
        raise ConfigError(f"out must be a local path for to='torch', got {out}", "out")
    if saved.kind == "text_to_image":
        tensors = _export_text_to_image(folder, saved, paths.local(out))
    elif saved.kind == "language_model":
        tensors = _export_language_model(folder, saved, paths.local(out))
    else:
        tensors = _export_file(folder, saved, paths.local(out), force)
    size = sum(array.nbytes for array in tensors.values())
    print(f"{out}: {len(tensors)} tensors, {tqdm.tqdm.format_sizeof(size, 'B')}")


def _export_file(folder: str, saved: ModelFolder, target: Path, force: bool) -> Tensors:
    if target.suffix != ".safetensors":
        raise ConfigError(
            f"out must be a .safetensors file for a {IN_WORDS[saved.kind]}, got {target}", "out"
        )
    config_file = target.with_name(f"{target.stem}_config.json")
    for file in (target, config_file):
        if file.exists() and not force:
            raise FileError(f"{file} exists; choose another, or force=True", file)
    where = f"{folder}/config.json: config"
    if saved.kind == "tokenizer":
        config = from_dict(TokenizerConfig, saved.config, where)
        tensors = _tokenizer(folder, saved.params, config)
        record = released_configs.tokenizer_record(config)
    else:
        model_config = from_dict(ClassConditionalConfig, saved.config, where)
        model_folder.check_shapes(
            folder, saved.params["model"], class_conditional.abstract_params(model_config)
        )
        tensors = parameters.to_release(saved.params["model"], keys.class_conditional(model_config))
        tensors |= _inner_tokenizer(folder, saved, model_config.tokenizer)
        record = released_configs.class_conditional_record(model_config)
    with replace_file(config_file) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    with replace_file(target) as temporary:
        safetensors_file.save(temporary, tensors, _own_record(saved))
    return tensors


def _export_text_to_image(folder: str, saved: ModelFolder, target: Path) -> Tensors:
    config = from_dict(TextToImageConfig, saved.config, f"{folder}/config.json: config")
    model_folder.check_shapes(folder, saved.params["model"], text_to_image.abstract_params(config))
    _check_new(target, "text-to-image")
    tensors = parameters.to_release(saved.params["model"], keys.text_to_image(config))
    tensors |= _inner_tokenizer(folder, saved, config.tokenizer)
    parts = _split_by_part(tensors)
    records = {
        "config.json": _language_model_record(config.text),
        "vision_head_config.json": released_text_to_image.vision_head_record(config),
        "ae_config.json": released_configs.tokenizer_record(config.tokenizer),
    }
    with atomic.replace_folder(target, sum(array.nbytes for array in tensors.values())) as new:
        _write_tokenizer_files(folder, new)
        for name, record in records.items():
            (new / name).write_text(json.dumps(record, indent=2) + "\n")
        safetensors_file.save_shards(new, "model", parts.pop("text"), SHARD_BYTES)
        for name, part in parts.items():
            metadata = _own_record(saved) if name == "vision_head" else {}
            safetensors_file.save(new / f"{name}.safetensors", part, metadata)
    return tensors


def _export_language_model(folder: str, saved: ModelFolder, target: Path) -> Tensors:
    config = from_dict(Qwen3Config, saved.config, f"{folder}/config.json: config")
    model_folder.check_shapes(folder, saved.params, qwen3.abstract_params(config))
    _check_new(target, "language")
    tensors = parameters.to_release(saved.params, keys.QWEN3)
    with atomic.replace_folder(target, sum(array.nbytes for array in tensors.values())) as new:
        _write_tokenizer_files(folder, new)
        record = json.dumps(_language_model_record(config), indent=2)
        (new / "config.json").write_text(record + "\n")
        safetensors_file.save_shards(new, "model", tensors, SHARD_BYTES)
    return tensors


def _language_model_record(config: Qwen3Config) -> dict[str, Any]:
    record = released_text_to_image.text_record(config)
    return {"architectures": ["Qwen3ForCausalLM"], **record}


def _check_new(target: Path, model: str) -> None:
    if target.suffix == ".safetensors":
        raise ConfigError(f"out must be a folder for a {model} model, got {target}", "out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileError(f"{target} exists; choose a new folder", target)


def _write_tokenizer_files(folder: str, target: Path) -> None:
    files = prompt_tokenizer.read_files(epath.Path(folder) / prompt_tokenizer.FOLDER)
    for name, content in files.items():
        (target / Path(name).name).write_bytes(content)


def _split_by_part(tensors: Tensors) -> dict[str, Tensors]:
    """The tensors of each part, without its prefix."""
    parts: dict[str, Tensors] = {name: {} for name in release_folder.PREFIXES}
    prefixes = {name: prefix for name, prefix in release_folder.PREFIXES.items() if prefix}
    for key, array in tensors.items():
        name = next((name for name, prefix in prefixes.items() if key.startswith(prefix)), "text")
        parts[name][key.removeprefix(release_folder.PREFIXES[name])] = array
    return parts


def _inner_tokenizer(folder: str, saved: ModelFolder, config: TokenizerConfig) -> Tensors:
    prefix = INNER_TOKENIZER[saved.kind]
    return {
        prefix + key: array
        for key, array in _tokenizer(folder, saved.params["tokenizer"], config).items()
    }


def _tokenizer(folder: str, params: Any, config: TokenizerConfig) -> Tensors:
    model_folder.check_shapes(folder, params, autoencoder.abstract_params(config))
    return parameters.to_release(params, keys.tokenizer(config))


def _own_record(saved: ModelFolder) -> dict[str, str]:
    return {
        "format": "pt",
        OWN_RECORD: json.dumps({"config": saved.config, "metadata": saved.metadata}),
    }
