"""Released files to a model folder."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from bitdance_jax import model_folder
from bitdance_jax.config import ClassConditionalConfig, TokenizerConfig, from_dict, to_dict
from bitdance_jax.convert import keys, lazy, parameters, sizes, sources
from bitdance_jax.convert.lazy import LazyArray
from bitdance_jax.convert.sources import Source
from bitdance_jax.errors import UserError
from bitdance_jax.models import class_conditional
from bitdance_jax.tokenizer import autoencoder


Params = dict[str, Any]


def convert(source: str, out: str, *, weights: sources.Weights = "ema", tokenizer: str | None = None) -> None:
    """Writes the model folder `out`, local or gs://.

    Args:
      source: see `sources.open_source`.
      weights: of a .pt file with both.
      tokenizer: a file or id whose tokenizer is taken instead of the one inside a class-conditional model's.

    Raises:
      UserError: the source cannot be read or is not one of the models, listing all its wrong keys; nothing is written then.
    """
    _check_out(out)
    opened = sources.open_source(source, weights)
    if opened.kind == "tokenizer":
        if tokenizer is not None:
            raise UserError(f"{opened.path} is a tokenizer itself; --tokenizer goes with a class-conditional model")
        config, abstract = _tokenizer_sizes(opened)
        _refuse(opened, parameters.problems(opened.tensors, abstract, keys.TOKENIZER))
        params = parameters.from_release(opened.tensors, abstract, keys.TOKENIZER)
        _write(out, opened, "tokenizer", to_dict(config), params, _metadata(opened))
        return
    model_config, params = _class_conditional(opened, _its_tokenizer(opened, tokenizer, weights))
    _write(out, opened, "class_conditional", to_dict(model_config), params, _metadata(opened, model_config, weights))


def _its_tokenizer(source: Source, tokenizer: str | None, weights: sources.Weights) -> Source:
    """The tokenizer that lies inside a class-conditional model's file, under `vae.`, or the one given instead."""
    if tokenizer is not None:
        given = sources.open_source(tokenizer, weights)
        if given.kind != "tokenizer":
            raise UserError(f"--tokenizer {tokenizer} is no tokenizer")
        return given
    inner = {key.removeprefix("vae."): array for key, array in source.tensors.items() if key.startswith("vae.")}
    if not inner:
        raise UserError(f"{source.path} has no tokenizer inside (no keys under vae.); add --tokenizer ae_d16c32.safetensors")
    own = source.own and {"config": source.own["config"]["tokenizer"]}
    return dataclasses.replace(source, kind="tokenizer", tensors=inner, own=own, notes=())


def _tokenizer_sizes(source: Source) -> tuple[TokenizerConfig, Params]:
    if source.own:
        config = from_dict(TokenizerConfig, source.own["config"], f"{source.path}: config")
    else:
        config = sizes.tokenizer_config(_shapes(source.tensors), source.record)
        _note_differences(source, sizes.tokenizer_record(config))
    return config, autoencoder.abstract_params(config)


def _class_conditional(source: Source, tokenizer: Source) -> tuple[ClassConditionalConfig, Params]:
    tokenizer_config, tokenizer_abstract = _tokenizer_sizes(tokenizer)
    tensors = {key: array for key, array in source.tensors.items() if not key.startswith("vae.")}
    if source.own:
        config = from_dict(ClassConditionalConfig, source.own["config"], f"{source.path}: config")
        config = dataclasses.replace(config, tokenizer=tokenizer_config)
    else:
        config = sizes.class_conditional_config(_shapes(tensors), source.record, tokenizer_config)
        _note_differences(source, sizes.class_conditional_record(config))
    table, abstract = keys.class_conditional(config), class_conditional.abstract_params(config)
    prefix = "vae." if tokenizer.path == source.path else ""
    tokenizer_problems = parameters.problems(tokenizer.tensors, tokenizer_abstract, keys.TOKENIZER, prefix)
    _refuse(source, parameters.problems(tensors, abstract, table) + tokenizer_problems)
    return config, {
        "model": parameters.from_release(tensors, abstract, table),
        "tokenizer": parameters.from_release(tokenizer.tensors, tokenizer_abstract, keys.TOKENIZER),
    }


def _shapes(tensors: parameters.Tensors) -> dict[str, tuple[int, ...]]:
    return {key: array.shape for key, array in tensors.items()}


def _metadata(source: Source, config: ClassConditionalConfig | None = None, weights: sources.Weights | None = None) -> dict[str, Any]:
    """Of the model folder: as it was before an export, or where the weights come from, and a published model's sampler."""
    if source.own:
        return source.own["metadata"]
    metadata: dict[str, Any] = {"source": source.path.name}
    if config is None:
        return metadata
    metadata |= {"class_names": None, "weights": weights}
    if known := sizes.published(config):
        name, sampler = known
        metadata |= {"name": name, "sampler": to_dict(sampler)}
    return metadata


def _note_differences(source: Source, inferred: dict[str, Any]) -> None:
    if wrong := sizes.differences(source.record, inferred):
        print(f"note: what is recorded with {source.path} does not fit its weights, which count: {'; '.join(wrong)}")


def _refuse(source: Source, problems: list[str]) -> None:
    if problems:
        raise UserError(f"{source.path} is not a model that is known here: {'; '.join(problems)}")


def _check_out(out: str) -> None:
    """A folder that is there is replaced if it is a model folder, or empty."""
    folder = epath.Path(out)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").exists())):
        raise UserError(f"{out} is there and is not a model folder; give another place, or remove it first")


def _write(out: str, source: Source, kind: model_folder.Kind, config: dict[str, Any], params: Params, metadata: dict[str, Any]) -> None:
    for note in source.notes:
        print(f"note: {note}")
    lazy.register()
    total = parameters.num_bytes(params)
    _check_space(out, total)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="converting", dynamic_ncols=True) as bar:

        def counted(array: LazyArray) -> LazyArray:
            def read(*index: int) -> np.ndarray:
                values = array.read(*index)
                bar.update(values.nbytes)
                return values

            return dataclasses.replace(array, read=read)

        try:
            model_folder.save(out, kind=kind, config=config, params=jax.tree.map(counted, params), metadata=metadata)
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error})") from error
    print(f"{out}: {kind} model, {total / 2**30:.2f} GiB of weights from {source.path.name}")


def _check_space(out: str, needed: int) -> None:
    if "://" in out:
        return
    place = Path(os.path.abspath(out))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{out} needs {needed / 2**30:.1f} GiB, and its disk has {free / 2**30:.1f} GiB left")
