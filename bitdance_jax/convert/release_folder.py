"""Reads models as released in several files: text-to-image models, the language model that they
start from, and class-conditional models in the diffusers layout.

Text-to-image models have two layouts: a Hugging Face Qwen3 with further files, and diffusers with a
folder a part.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from bitdance_jax.convert import safetensors_file
from bitdance_jax.convert.safetensors_file import Tensors
from bitdance_jax.errors import FileError
from bitdance_jax.io import readers


class Part(NamedTuple):
    """The files of a part of the model.

    Attributes:
      folder: their folder.
      stems: possible stems of the .safetensors files.
      config: name of the config file, or None.
    """

    folder: str
    stems: tuple[str, ...]
    config: str | None


class Layout(NamedTuple):
    """The parts of a model, and the folder of its tokenizer files."""

    text: Part
    vision_head: Part
    projector: Part
    ae: Part
    text_tokenizer: str


PLAIN = Layout(
    text=Part("", ("model",), "config.json"),
    vision_head=Part("", ("vision_head",), "vision_head_config.json"),
    projector=Part("", ("projector",), None),
    ae=Part("", ("ae",), "ae_config.json"),
    text_tokenizer="",
)
STEMS = ("diffusion_pytorch_model", "model")
DIFFUSERS = Layout(
    text=Part("text_encoder", STEMS, "config.json"),
    vision_head=Part("diffusion_head", STEMS, "config.json"),
    projector=Part("projector", STEMS, None),
    ae=Part("autoencoder", STEMS, "config.json"),
    text_tokenizer="tokenizer",
)
SIGNS = ("vision_head.safetensors", "projector.safetensors", "model.safetensors.index.json")
"""Files that only the plain layout has, beside a language model alone."""

LANGUAGE_MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
OTHER_PARTS = ("vision_head", "projector", "ae.", "ae_")
"""How the names of files begin that a text-to-image model has and a language model does not."""

TRANSFORMER = Part("transformer", STEMS, "config.json")
"""Of a class-conditional model in the diffusers layout, beside its `autoencoder`."""

PREFIXES = {"text": "", "vision_head": "vision_head.", "projector": "projector.", "ae": "ae."}
"""Prefixes of each part's keys in the state dict of the model."""


class ClassConditional(NamedTuple):
    """A class-conditional model in the diffusers layout.

    Attributes:
      transformer, autoencoder: their tensors; the second is {} if there is none.
      config, autoencoder_config: contents of their config files.
      metadata: of the transformer's .safetensors file.
    """

    transformer: Tensors
    autoencoder: Tensors
    config: dict[str, Any]
    autoencoder_config: dict[str, Any]
    metadata: dict[str, str]


class Release(NamedTuple):
    """A text-to-image model as released, or a language model alone, which is its part "text".

    Attributes:
      tensors: of all parts, with the PREFIXES.
      configs: the contents of the config files, by part.
      metadata: of the vision head's .safetensors file, or the language model's.
      text_tokenizer: the folder of the tokenizer files.
    """

    tensors: Tensors
    configs: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    text_tokenizer: Path


def layout(names: set[str]) -> Layout | None:
    """The layout of a folder or repository; None if it is not a text-to-image model.

    Args:
      names: of files, and of folders with a trailing slash.
    """
    if any(name.startswith("text_encoder/") for name in names):
        return DIFFUSERS
    if is_language_model(names):
        return None
    return PLAIN if any(sign in names for sign in SIGNS) else None


def is_language_model(names: set[str]) -> bool:
    """Whether a folder or repository is a Hugging Face language model and nothing more.

    Args:
      names: see `layout`.
    """
    return (
        "config.json" in names
        and any(LANGUAGE_MODEL_WEIGHTS.fullmatch(name) for name in names)
        and not any(name.startswith(OTHER_PARTS) for name in names)
    )


def is_class_conditional(names: set[str]) -> bool:
    """Whether a folder or repository is a class-conditional model in the diffusers layout.

    Args:
      names: see `layout`.
    """
    folders = {name.partition("/")[0] for name in names if "/" in name}
    return TRANSFORMER.folder in folders and DIFFUSERS.text.folder not in folders


def load_class_conditional(path: Path) -> ClassConditional:
    """Opens a class-conditional model in the diffusers layout; no tensor is read.

    Raises:
      FileError: files of the transformer are missing (the message lists them), or damaged.
    """
    stem = _stem(path, TRANSFORMER)
    if missing := _missing_files_of(path, TRANSFORMER, stem):
        raise FileError(
            f"{path} is an incomplete class-conditional model; fetch what is missing: "
            f"{', '.join(map(str, missing))}",
            path,
        )
    transformer = safetensors_file.load_shards(path / TRANSFORMER.folder, stem)
    config = readers.read_json(path / TRANSFORMER.folder / "config.json")
    autoencoder_stem = _stem(path, DIFFUSERS.ae)
    if _missing_files_of(path, DIFFUSERS.ae, autoencoder_stem):
        return ClassConditional(transformer.tensors, {}, config, {}, transformer.metadata)
    folder = path / DIFFUSERS.ae.folder
    return ClassConditional(
        transformer.tensors,
        safetensors_file.load_shards(folder, autoencoder_stem).tensors,
        config,
        readers.read_json(folder / "config.json"),
        transformer.metadata,
    )


def load_language_model(path: Path) -> Release:
    """Opens a language model alone; no tensor is read.

    Raises:
      FileError: files are missing (the message lists them) or damaged.
    """
    if missing := _missing_files(path, PLAIN, {"text": PLAIN.text}, {"text": "model"}):
        raise FileError(
            f"{path} is an incomplete language model; fetch what is missing: {', '.join(missing)}",
            path,
        )
    file = safetensors_file.load_shards(path, "model")
    config = readers.read_json(path / "config.json")
    return Release(file.tensors, {"text": config}, file.metadata, path)


def load(path: Path, layout: Layout) -> Release:
    """Opens all parts; no tensor is read.

    Raises:
      FileError: files are missing (the message lists them) or damaged.
    """
    parts: dict[str, Part] = {name: getattr(layout, name) for name in PREFIXES}
    stems = {name: _stem(path, part) for name, part in parts.items()}
    if missing := _missing_files(path, layout, parts, stems):
        raise FileError(
            f"{path} is an incomplete text-to-image model; fetch what is missing:"
            f" {', '.join(missing)}",
            path,
        )
    files = {
        name: safetensors_file.load_shards(path / parts[name].folder, stem)
        for name, stem in stems.items()
    }
    tensors = {
        PREFIXES[name] + key: array
        for name, file in files.items()
        for key, array in file.tensors.items()
    }
    configs = {
        name: readers.read_json(path / part.folder / part.config)
        for name, part in parts.items()
        if part.config
    }
    return Release(tensors, configs, files["vision_head"].metadata, path / layout.text_tokenizer)


def _stem(path: Path, part: Part) -> str:
    """The stem of a part's weights; the first possible one if there are none."""
    found = (stem for stem in part.stems if _has_weights(path / part.folder, stem))
    return next(found, part.stems[0])


def _missing_files(
    path: Path, layout: Layout, parts: dict[str, Part], stems: dict[str, str]
) -> list[str]:
    missing = []
    for name, part in parts.items():
        missing += _missing_files_of(path, part, stems[name])
    if not (path / layout.text_tokenizer / "tokenizer.json").is_file():
        missing.append(Path(layout.text_tokenizer, "tokenizer.json"))
    return [str(file) for file in missing]


def _missing_files_of(path: Path, part: Part, stem: str) -> list[Path]:
    missing = []
    folder = path / part.folder
    if not _has_weights(folder, stem):
        has_shards = any(folder.glob(f"{stem}-*-of-*.safetensors"))
        suffix = ".safetensors.index.json" if has_shards else ".safetensors"
        missing.append(Path(part.folder, stem + suffix))
    if part.config and not (folder / part.config).is_file():
        missing.append(Path(part.folder, part.config))
    return missing


def _has_weights(folder: Path, stem: str) -> bool:
    return any((folder / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))
