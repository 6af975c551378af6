"""What a text-to-image run starts from: weights and the files of the prompt tokenizer."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from flax import traverse_util

from bitdance_jax.config import Qwen3Config, TextToImageConfig, from_dict, to_dict
from bitdance_jax.config.plain import require
from bitdance_jax.convert import peft
from bitdance_jax.data.captioned import CaptionedSource
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io import model_lookup
from bitdance_jax.io.image_files import DamagedImage
from bitdance_jax.io.manifest import IN_WORDS
from bitdance_jax.io.model_lookup import UnfinishedRun
from bitdance_jax.nn import lora
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.text import image_tokens, prompt_tokenizer
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer
from bitdance_jax.text.train_tokenizer import TEMPLATE, train_tokenizer
from bitdance_jax.train import freezing
from bitdance_jax.train.task import Params
from bitdance_jax.train.text_to_image_config import BYTES, CAPTIONS, TextToImageSettings
from bitdance_jax.transformer import vocabulary


MAX_READ_FOR_PROMPTS = 20_000
"""Images of each source whose captions a prompt tokenizer is made from."""


def read_init(config: TextToImageSettings, folder: str) -> Params:
    """The weights of the model that the run starts from, the frozen ones too: of a
    text-to-image model, or of a language model, whose part "text" they are.

    Those of a model folder are StoredArrays (`model_lookup.open_weights`), except for new tables of
    a vocabulary that grows.

    The vocabulary grows if this model has more queries, or added tokens at all.

    Raises:
      UserError: there is no such model, or one of other sizes or of another kind.
    """
    folder = local_folder(folder)
    described = model_lookup.read_config(folder)
    where = f"{folder}/config.json: config"
    fixed = "lora.rank" if config.lora.rank else "freeze" if config.freeze else None
    if described.kind == "language_model":
        text = from_dict(Qwen3Config, described.config, where)
        rows = max(text.vocab_size, config.model.text.vocab_size)
        grown: Any = dataclasses.replace(text, vocab_size=rows)
        _check_same_sizes(folder, grown, config.model.text, "model.text")
        if fixed:
            raise ConfigError(
                f"{fixed} needs an init with all weights, and {folder} holds a language model",
                fixed,
            )
        params: Params = {"text": model_lookup.open_weights(folder).params}
    elif described.kind == "text_to_image":
        there = from_dict(TextToImageConfig, described.config, where)
        grown = there.with_tokens_per_step(config.model.tokens_per_step, config.model.image_tokens)
        _check_same_sizes(folder, grown, config.model, "model")
        if fixed and there != config.model:
            raise ConfigError(
                f"{fixed} needs an init with as many tokens a step, and {folder} has "
                f"{there.tokens_per_step}",
                fixed,
            )
        params = model_lookup.open_weights(folder).params["model"]
    else:
        held = IN_WORDS[described.kind]
        raise UserError(f"init {folder} holds a {held}, and this run trains a text-to-image model")
    key = jax.random.key(config.run.seed)
    return {**params, "text": vocabulary.grow(params["text"], config.model.text.vocab_size, key)}


def read_adapters(config: TextToImageSettings, folder: str) -> Params:
    """The adapters that the run starts from (`lora.init`), with the scale of its own.

    Raises:
      UserError: there is no adapter, or one of another model, of another rank or of other layers.
    """
    settings = config.lora
    adapters = peft.load(folder, config.model)
    given = traverse_util.flatten_dict(adapters.params)
    rank = adapters.config.rank
    require(
        rank == settings.rank,
        f"the adapter in lora.init {folder} has rank {rank}, and lora.rank is {settings.rank}; "
        f"set lora.rank {rank}",
        "lora.rank",
    )
    expected = peft.adapted(config.model, settings)
    require(
        {path[:-1] for path in given} == {path[:-1] for path in expected},
        f"the adapter in lora.init {folder} is of the layers {' '.join(adapters.config.targets)}, "
        f"and lora.targets are {' '.join(settings.targets)}; name the same layers",
        "lora.targets",
    )
    assert config.init is not None  # Checked in __post_init__.
    peft.report_other_base(adapters, folder, local_folder(config.init))
    rescale = adapters.config.scale / settings.scale
    return traverse_util.unflatten_dict(
        {path: rescale * x if path[-1] == lora.B else x for path, x in given.items()}
    )


def prompt_files(
    config: TextToImageSettings, sources: Sequence[CaptionedSource]
) -> dict[str, bytes]:
    """The files of the prompt tokenizer, by their path in a model folder.

    Args:
      config: of the run.
      sources: opened training data.

    Raises:
      UserError: the folder has none, or damaged ones.
    """
    path = f"{prompt_tokenizer.FOLDER}/tokenizer.json"
    if config.text_tokenizer == BYTES:
        return {path: toy_text_to_image.tokenizer_json(config.model.tokens_per_step).encode()}
    if config.text_tokenizer == CAPTIONS:
        ids = config.model.image_tokens
        content = train_tokenizer(
            _captions(sources),
            vocab_size=ids.first_resolution - len(TEMPLATE),
            num_resolutions=ids.num_resolutions,
            tokens_per_step=config.model.tokens_per_step,
        )
        return {path: content.encode()}
    if config.text_tokenizer is not None:
        folder = epath.Path(local_folder(config.text_tokenizer))
    else:
        assert config.init is not None  # Checked in __post_init__.
        found = model_lookup.locate(local_folder(config.init))
        folder = epath.Path(found.folder if isinstance(found, UnfinishedRun) else found)
    inner = folder / prompt_tokenizer.FOLDER
    files = prompt_tokenizer.read_files(inner if inner.exists() else folder)
    if path not in files:
        raise ConfigError(
            f"{folder} has no tokenizer.json; text_tokenizer must be a folder with the files of a"
            " prompt tokenizer, or a text-to-image model",
            "text_tokenizer",
        )
    return image_tokens.add_image_tokens(files, config.model.tokens_per_step)


def _captions(sources: Sequence[CaptionedSource]) -> Iterator[str]:
    """Those of the first images of each source."""
    for source in sources:
        for index in range(min(len(source), MAX_READ_FOR_PROMPTS)):
            with contextlib.suppress(DamagedImage):
                yield from source.captions_of(index)


def open_prompts(files: Mapping[str, bytes], model: TextToImageConfig) -> PromptTokenizer:
    """The prompt tokenizer of these files.

    Raises:
      UserError: they are missing, or those of another model.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / Path(name).name).write_bytes(content)
        prompts = PromptTokenizer(folder, model.tokens_per_step)
    prompts.end_of_image()
    if prompts.image_tokens != model.image_tokens:
        raise ConfigError(
            f"the files of the prompt tokenizer have {prompts.image_tokens}, and model.image_tokens"
            f" are {model.image_tokens}; use the model's own files",
            "text_tokenizer",
        )
    return prompts


def _check_same_sizes(folder: str, there: Any, here: Any, name: str) -> None:
    """Raises a ConfigError that names the fields in which the config of `init` is not that of the
    run, which is the field `name`."""
    theirs, ours = (freezing.flat(to_dict(config), ".") for config in (there, here))
    names = [field for field in theirs if theirs[field] != ours.get(field)]
    if names:
        differ = ", ".join(
            f"{name}.{field} is {theirs[field]} there and {ours.get(field)} here" for field in names
        )
        raise ConfigError(
            f"init {folder} holds another model: {differ}; choose the config of that model, or set "
            "these fields",
            "init",
        )
