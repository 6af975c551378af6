"""Converts released files to a model folder."""

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
from bitdance_jax.convert import (
    keys,
    parameters,
    released_configs,
    released_text_to_image,
    sources,
)
from bitdance_jax.convert.sources import OwnRecord, Source
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.io import model_folder
from bitdance_jax.io.lazy_array import LazyArray
from bitdance_jax.io.manifest import IN_WORDS
from bitdance_jax.models import class_conditional, text_to_image
from bitdance_jax.text import prompt_tokenizer
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer
from bitdance_jax.tokenizer import autoencoder
from bitdance_jax.transformer import qwen3


Params = dict[str, Any]


class Converted(NamedTuple):
    """The content of a model folder; see `model_folder.save`."""

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
      weights: which weights of a .pt file with both.
      tokenizer: a file or id of a tokenizer that replaces the model's own.
      tokenizer_only: convert only the tokenizer of a model.
      force: replace an existing model folder.

    Raises:
      ConfigError: an argument does not fit the source.
      FileError: the source cannot be read or is not a known model; the message lists all wrong
        keys. Nothing is written.
    """
    model_folder.check_writable(out, force=force)
    opened = sources.open_source(source, weights)
    if opened.kind == "language_model" and (tokenizer is not None or tokenizer_only):
        raise ConfigError(f"{opened.path} is a language model, without an image tokenizer")
    if tokenizer is not None and (tokenizer_only or opened.kind == "tokenizer"):
        reason = "tokenizer_only is set" if tokenizer_only else f"{opened.path} is a tokenizer"
        raise ConfigError(f"tokenizer replaces the tokenizer of a model, but {reason}", "tokenizer")
    if tokenizer_only and opened.kind != "tokenizer":
        opened = _open_tokenizer(opened, None, weights)
    if opened.kind == "tokenizer":
        converted = _tokenizer(opened)
    elif opened.kind == "language_model":
        converted = _language_model(opened)
    elif opened.kind == "class_conditional":
        converted = _class_conditional(opened, _open_tokenizer(opened, tokenizer, weights), weights)
    else:
        converted = _text_to_image(opened, _open_tokenizer(opened, tokenizer, weights))
    _write(out, opened, converted, force)


def _open_tokenizer(source: Source, tokenizer: str | None, weights: sources.Weights) -> Source:
    """The tokenizer in a model's state dict, or the one that replaces it."""
    if tokenizer is not None:
        given = sources.open_source(tokenizer, weights)
        if given.kind != "tokenizer":
            raise ConfigError(f"tokenizer {tokenizer} is a {IN_WORDS[given.kind]}", "tokenizer")
        return given
    prefix = sources.INNER_TOKENIZER[source.kind]
    inner = {
        key.removeprefix(prefix): array
        for key, array in source.tensors.items()
        if key.startswith(prefix)
    }
    if not inner:
        released = "ae_d16c32.pt of BitDance-ImageNet"
        if source.kind == "text_to_image":
            released = "ae.safetensors"
        raise ConfigError(
            f"{source.path} contains no tokenizer (no keys under {prefix}); "
            f"add one, for example tokenizer='{released}'",
            "tokenizer",
        )
    own = None
    if source.own:
        config = source.own["config"].get("tokenizer", {})
        own = OwnRecord(config=config, metadata={"source": _name(source)})
    return dataclasses.replace(source, kind="tokenizer", tensors=inner, own=own, notes=())


def _tokenizer(source: Source) -> Converted:
    config = _tokenizer_config(source)
    abstract = autoencoder.abstract_params(config)
    table = keys.tokenizer(config)
    _check(source, parameters.problems(source.tensors, abstract, table))
    params = parameters.from_release(source.tensors, abstract, table)
    return Converted("tokenizer", to_dict(config), params, _metadata(source, {}), {})


def _tokenizer_config(source: Source) -> TokenizerConfig:
    if source.own:
        config = from_dict(TokenizerConfig, source.own["config"], f"{source.path}: config")
    else:
        config = released_configs.tokenizer_config(_shapes(source.tensors), source.record)
        _note_differences(source, released_configs.tokenizer_record(config))
    return config


def _class_conditional(source: Source, tokenizer: Source, weights: sources.Weights) -> Converted:
    tokenizer_config = _tokenizer_config(tokenizer)
    tensors = _without_tokenizer(source)
    if source.own:
        config = from_dict(ClassConditionalConfig, source.own["config"], f"{source.path}: config")
        config = dataclasses.replace(config, tokenizer=tokenizer_config)
    else:
        config = released_configs.class_conditional_config(
            _shapes(tensors), source.record, tokenizer_config
        )
        _note_differences(source, released_configs.class_conditional_record(config))
    params = _params(
        source,
        tensors=tensors,
        abstract=class_conditional.abstract_params(config),
        table=keys.class_conditional(config),
        tokenizer=tokenizer,
        tokenizer_config=tokenizer_config,
    )
    metadata: dict[str, Any] = {"class_names": None, "weights": weights}
    if known := released_configs.published(config):
        name, sampler = known
        metadata |= {"name": name, "sampler": to_dict(sampler)}
    return Converted("class_conditional", to_dict(config), params, _metadata(source, metadata), {})


def text_to_image_config(source: Source, tokenizer: Source | None = None) -> TextToImageConfig:
    """The config of a text-to-image model. No tensor is read.

    Args:
      source: the model.
      tokenizer: replaces the model's own.

    Raises:
      ConfigError: the model has no tokenizer.
      FileError: the configs or shapes are not those of a known model.
    """
    assert source.text_tokenizer is not None
    tokenizer_config = _tokenizer_config(tokenizer or _open_tokenizer(source, None, "ema"))
    head = source.record["vision_head"]
    prompts = PromptTokenizer(source.text_tokenizer, released_text_to_image.tokens_per_step(head))
    if source.own:
        config = from_dict(TextToImageConfig, source.own["config"], f"{source.path}: config")
        return dataclasses.replace(
            config, tokenizer=tokenizer_config, image_tokens=prompts.image_tokens
        )
    config = released_text_to_image.text_to_image_config(
        _shapes(_without_tokenizer(source)),
        text=source.record["text"],
        vision_head=head,
        tokenizer=tokenizer_config,
        prompts=prompts,
    )
    _note_differences(
        source,
        {
            "text": released_text_to_image.text_record(config.text),
            "vision_head": released_text_to_image.vision_head_record(config),
        },
    )
    return config


def _text_to_image(source: Source, tokenizer: Source) -> Converted:
    assert source.text_tokenizer is not None
    config = text_to_image_config(source, tokenizer)
    params = _params(
        source,
        tensors=_without_tokenizer(source),
        abstract=text_to_image.abstract_params(config),
        table=keys.text_to_image(config),
        tokenizer=tokenizer,
        tokenizer_config=config.tokenizer,
    )
    metadata = _metadata(source, {"sampler": to_dict(released_text_to_image.SAMPLER)})
    files = prompt_tokenizer.read_files(source.text_tokenizer)
    return Converted("text_to_image", to_dict(config), params, metadata, files)


def _language_model(source: Source) -> Converted:
    assert source.text_tokenizer is not None
    tensors = dict(source.tensors)
    config = released_text_to_image.qwen3_config(_shapes(tensors), source.record)
    is_tied = released_text_to_image.is_tied(source.record)
    inferred = released_text_to_image.text_record(config) | {"tie_word_embeddings": is_tied}
    _note_differences(source, inferred)
    if is_tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    abstract = qwen3.abstract_params(config)
    _check(source, parameters.problems(tensors, abstract, keys.QWEN3))
    params = parameters.from_release(tensors, abstract, keys.QWEN3)
    files = prompt_tokenizer.read_files(source.text_tokenizer)
    return Converted("language_model", to_dict(config), params, _metadata(source, {}), files)


def _params(
    source: Source,
    *,
    tensors: parameters.Tensors,
    abstract: Params,
    table: keys.Table,
    tokenizer: Source,
    tokenizer_config: TokenizerConfig,
) -> Params:
    """The parameters of a model with its tokenizer; a FileError lists the wrong keys of both."""
    prefix = sources.INNER_TOKENIZER[source.kind] if tokenizer.path == source.path else ""
    tokenizer_table = keys.tokenizer(tokenizer_config)
    tokenizer_abstract = autoencoder.abstract_params(tokenizer_config)
    tokenizer_problems = parameters.problems(
        tokenizer.tensors, tokenizer_abstract, tokenizer_table, prefix=prefix
    )
    _check(source, parameters.problems(tensors, abstract, table) + tokenizer_problems)
    return {
        "model": parameters.from_release(tensors, abstract, table),
        "tokenizer": parameters.from_release(
            tokenizer.tensors, tokenizer_abstract, tokenizer_table
        ),
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
    """Metadata of the model folder: those of a folder that was exported, or the source and more."""
    return source.own["metadata"] if source.own else {"source": _name(source), **metadata}


def _name(source: Source) -> str:
    return source.name or os.path.basename(os.path.abspath(source.path))


def _note_differences(source: Source, inferred: dict[str, Any]) -> None:
    if wrong := released_configs.differences(source.record, inferred):
        print(
            f"note: what is recorded with {source.path} does not fit its weights,"
            f" which are used: {'; '.join(wrong)}"
        )


def _check(source: Source, problems: list[str]) -> None:
    if problems:
        line = f"{source.path} is not a known model: {'; '.join(problems)}"
        raise FileError(line, source.path)


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
        f"{out}: {converted.kind.removesuffix('_model')} model,"
        f" {tqdm.tqdm.format_sizeof(total, 'B')} of weights from {_name(source)}"
    )
