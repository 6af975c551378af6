"""Released files to a model folder."""

import dataclasses
import os
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from bitdance_jax.config import (
    ClassConditionalConfig,
    TextToImageConfig,
    TokenizerConfig,
    from_dict,
    to_dict,
)
from bitdance_jax.convert import keys, parameters, sizes, sources
from bitdance_jax.convert import text_to_image as release_sizes
from bitdance_jax.convert.sources import OwnRecord, Source
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io import model_folder
from bitdance_jax.io.lazy_array import LazyArray
from bitdance_jax.models import class_conditional, text_to_image
from bitdance_jax.text import prompt_tokenizer
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer
from bitdance_jax.tokenizer import autoencoder


Params = dict[str, Any]


class Converted(NamedTuple):
    """What a model folder is written of."""

    kind: model_folder.Kind
    config: dict[str, Any]
    params: Params
    metadata: dict[str, Any]
    files: dict[str, bytes]


def convert(
    source: str,
    out: str,
    *,
    weights: sources.Weights = "ema",
    tokenizer: str | None = None,
    tokenizer_only: bool = False,
    force: bool = False,
) -> None:
    """Writes the model folder `out`, local or gs://.

    Args:
      source: see `sources.open_source`.
      weights: of a .pt file with both.
      tokenizer: a file or id whose tokenizer is taken instead of the model's own.
      tokenizer_only: leave out all of a model but its tokenizer.
      force: replace the model that is in the folder already.

    Raises:
      UserError: the source cannot be read or is not one of the models, listing all its wrong keys; nothing is written then.
    """
    model_folder.check_writable(out, force=force)
    opened = sources.open_source(source, weights)
    if tokenizer is not None and (tokenizer_only or opened.kind == "tokenizer"):
        reason = "tokenizer_only is set" if tokenizer_only else f"{opened.path} is a tokenizer"
        raise ConfigError(f"tokenizer replaces the tokenizer of a model, but {reason}", "tokenizer")
    if tokenizer_only and opened.kind != "tokenizer":
        opened = _its_tokenizer(opened, None, weights)
    if opened.kind == "tokenizer":
        converted = _tokenizer(opened)
    elif opened.kind == "class_conditional":
        converted = _class_conditional(opened, _its_tokenizer(opened, tokenizer, weights), weights)
    else:
        converted = _text_to_image(opened, _its_tokenizer(opened, tokenizer, weights))
    _write(out, opened, converted, force)


def _its_tokenizer(source: Source, tokenizer: str | None, weights: sources.Weights) -> Source:
    """The tokenizer that lies inside a model's state dict, or the one given instead."""
    if tokenizer is not None:
        given = sources.open_source(tokenizer, weights)
        if given.kind != "tokenizer":
            raise ConfigError(f"tokenizer {tokenizer} is a {given.kind} model", "tokenizer")
        return given
    prefix = sources.INNER_TOKENIZER[source.kind]
    inner = {
        key.removeprefix(prefix): array
        for key, array in source.tensors.items()
        if key.startswith(prefix)
    }
    if not inner:
        released = (
            "ae.safetensors"
            if source.kind == "text_to_image"
            else "ae_d16c32.pt of BitDance-ImageNet"
        )
        raise ConfigError(
            f"{source.path} contains no tokenizer (no keys under {prefix}); "
            f"add one, for example tokenizer='{released}'",
            "tokenizer",
        )
    own = source.own and OwnRecord(
        config=source.own["config"].get("tokenizer", {}), metadata={"source": _name(source)}
    )
    return dataclasses.replace(source, kind="tokenizer", tensors=inner, own=own, notes=())


def _tokenizer(source: Source) -> Converted:
    config, abstract = _tokenizer_sizes(source)
    _refuse(source, parameters.problems(source.tensors, abstract, keys.TOKENIZER))
    params = parameters.from_release(source.tensors, abstract, keys.TOKENIZER)
    return Converted("tokenizer", to_dict(config), params, _metadata(source, {}), {})


def _tokenizer_sizes(source: Source) -> tuple[TokenizerConfig, Params]:
    if source.own:
        config = from_dict(TokenizerConfig, source.own["config"], f"{source.path}: config")
    else:
        config = sizes.tokenizer_config(_shapes(source.tensors), source.record)
        _note_differences(source, sizes.tokenizer_record(config))
    return config, autoencoder.abstract_params(config)


def _class_conditional(source: Source, tokenizer: Source, weights: sources.Weights) -> Converted:
    tokenizer_config, tokenizer_abstract = _tokenizer_sizes(tokenizer)
    tensors = _without_tokenizer(source)
    if source.own:
        config = from_dict(ClassConditionalConfig, source.own["config"], f"{source.path}: config")
        config = dataclasses.replace(config, tokenizer=tokenizer_config)
    else:
        config = sizes.class_conditional_config(_shapes(tensors), source.record, tokenizer_config)
        _note_differences(source, sizes.class_conditional_record(config))
    table, abstract = keys.class_conditional(config), class_conditional.abstract_params(config)
    params = _params(source, tensors, abstract, table, tokenizer, tokenizer_abstract)
    metadata: dict[str, Any] = {"class_names": None, "weights": weights}
    if known := sizes.published(config):
        name, sampler = known
        metadata |= {"name": name, "sampler": to_dict(sampler)}
    return Converted("class_conditional", to_dict(config), params, _metadata(source, metadata), {})


def _text_to_image(source: Source, tokenizer: Source) -> Converted:
    assert source.text_tokenizer is not None
    tokenizer_config, tokenizer_abstract = _tokenizer_sizes(tokenizer)
    tensors, text, head = (
        _without_tokenizer(source),
        source.record["text"],
        source.record["vision_head"],
    )
    prompts = PromptTokenizer(source.text_tokenizer, release_sizes.tokens_per_step(head))
    if source.own:
        config = from_dict(TextToImageConfig, source.own["config"], f"{source.path}: config")
        config = dataclasses.replace(
            config, tokenizer=tokenizer_config, image_tokens=prompts.image_tokens
        )
    else:
        config = release_sizes.text_to_image_config(
            _shapes(tensors), text, head, tokenizer_config, prompts
        )
        _note_differences(
            source,
            {
                "text": release_sizes.text_record(config.text),
                "vision_head": release_sizes.vision_head_record(config),
            },
        )
    table, abstract = keys.text_to_image(config), text_to_image.abstract_params(config)
    params = _params(source, tensors, abstract, table, tokenizer, tokenizer_abstract)
    metadata = _metadata(source, {"sampler": to_dict(release_sizes.SAMPLER)})
    return Converted(
        "text_to_image",
        to_dict(config),
        params,
        metadata,
        prompt_tokenizer.read_files(source.text_tokenizer),
    )


def _params(
    source: Source,
    tensors: parameters.Tensors,
    abstract: Params,
    table: keys.Table,
    tokenizer: Source,
    tokenizer_abstract: Params,
) -> Params:
    """Of a model with its tokenizer; a UserError that lists all that is wrong with either's keys."""
    prefix = sources.INNER_TOKENIZER[source.kind] if tokenizer.path == source.path else ""
    tokenizer_problems = parameters.problems(
        tokenizer.tensors, tokenizer_abstract, keys.TOKENIZER, prefix
    )
    _refuse(source, parameters.problems(tensors, abstract, table) + tokenizer_problems)
    return {
        "model": parameters.from_release(tensors, abstract, table),
        "tokenizer": parameters.from_release(tokenizer.tensors, tokenizer_abstract, keys.TOKENIZER),
    }


def _without_tokenizer(source: Source) -> parameters.Tensors:
    return {
        key: array
        for key, array in source.tensors.items()
        if not key.startswith(sources.INNER_TOKENIZER[source.kind])
    }


def _shapes(tensors: parameters.Tensors) -> dict[str, tuple[int, ...]]:
    return {key: array.shape for key, array in tensors.items()}


def _metadata(source: Source, metadata: dict[str, Any]) -> dict[str, Any]:
    """Of the model folder: as it was before an export, or where the weights come from, and what else is known."""
    return source.own["metadata"] if source.own else {"source": _name(source), **metadata}


def _name(source: Source) -> str:
    return source.name or os.path.basename(os.path.abspath(source.path))


def _note_differences(source: Source, inferred: dict[str, Any]) -> None:
    if wrong := sizes.differences(source.record, inferred):
        print(
            f"note: what is recorded with {source.path} does not fit its weights, which count: {'; '.join(wrong)}"
        )


def _refuse(source: Source, problems: list[str]) -> None:
    if problems:
        raise UserError(f"{source.path} is not a model that is known here: {'; '.join(problems)}")


def _write(out: str, source: Source, converted: Converted, force: bool) -> None:
    for note in source.notes:
        print(f"note: {note}")
    total = parameters.num_bytes(converted.params)
    with tqdm.tqdm(
        total=total, unit="B", unit_scale=True, desc="converting", dynamic_ncols=True
    ) as bar:

        def counted(array: LazyArray) -> LazyArray:
            def read(*index: int) -> np.ndarray:
                values = array.read(*index)
                bar.update(values.nbytes)
                return values

            return dataclasses.replace(array, read=read)

        converted = converted._replace(params=jax.tree.map(counted, converted.params))
        model_folder.save(out, **converted._asdict(), force=force)
    print(
        f"{out}: {converted.kind} model, {tqdm.tqdm.format_sizeof(total, 'B')} of weights from {_name(source)}"
    )
