"""Text-to-image models as released: a Hugging Face Qwen3 with files beside it, or the diffusers layout with a folder for each part."""

from pathlib import Path
from typing import Any, NamedTuple

from bitdance_jax.convert import safetensors_file
from bitdance_jax.convert.safetensors_file import Tensors
from bitdance_jax.errors import UserError
from bitdance_jax.io import readers


class Part(NamedTuple):
    """Where a layout keeps a part of the model: a folder, the stems that its .safetensors files may have, its config file if it has one."""

    folder: str
    stems: tuple[str, ...]
    config: str | None


class Layout(NamedTuple):
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
"""Files that only the plain layout has."""

CLASS_CONDITIONAL = (
    "class-conditional models in the diffusers layout are not converted yet; take the release's .pt"
)

PREFIXES = {"text": "", "vision_head": "vision_head.", "projector": "projector.", "ae": "ae."}
"""How each part's keys begin in the state dict of the whole; the language model's are told by their names."""


class Release(NamedTuple):
    """A text-to-image model as released.

    Attributes:
      tensors: of all parts, under PREFIXES.
      configs: the contents of the config files, by part.
      metadata: strings noted in the vision head's file.
      text_tokenizer: the folder with the tokenizer files.
    """

    tensors: Tensors
    configs: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    text_tokenizer: Path


def layout(names: set[str]) -> Layout | None:
    """The layout of a folder or repository with these files, or folders with a slash; None if it is no text-to-image model."""
    if any(name.startswith("text_encoder/") for name in names):
        return DIFFUSERS
    return PLAIN if any(sign in names for sign in SIGNS) else None


def load(path: Path, layout: Layout) -> Release:
    """Opens all parts; no tensor is read.

    Raises:
      UserError: files are missing, all of them named, or damaged.
    """
    stems, missing = {}, []
    for name in PREFIXES:
        part: Part = getattr(layout, name)
        stems[name] = next(
            (stem for stem in part.stems if _has_weights(path / part.folder, stem)), part.stems[0]
        )
        if not _has_weights(path / part.folder, stems[name]):
            shards = any((path / part.folder).glob(f"{stems[name]}-*-of-*.safetensors"))
            missing.append(
                str(
                    Path(part.folder, f"{stems[name]}.safetensors{'.index.json' if shards else ''}")
                )
            )
        if part.config and not (path / part.folder / part.config).is_file():
            missing.append(str(Path(part.folder, part.config)))
    if not (path / layout.text_tokenizer / "tokenizer.json").is_file():
        missing.append(str(Path(layout.text_tokenizer, "tokenizer.json")))
    if missing:
        raise UserError(
            f"{path} is not a whole text-to-image model; fetch what is missing: {', '.join(missing)}"
        )
    files = {
        name: safetensors_file.load_shards(path / getattr(layout, name).folder, stem)
        for name, stem in stems.items()
    }
    tensors = {
        PREFIXES[name] + key: array
        for name, file in files.items()
        for key, array in file.tensors.items()
    }
    parts = {name: getattr(layout, name) for name in PREFIXES}
    configs = {
        name: readers.read_json(path / part.folder / part.config)
        for name, part in parts.items()
        if part.config
    }
    return Release(tensors, configs, files["vision_head"].metadata, path / layout.text_tokenizer)


def _has_weights(folder: Path, stem: str) -> bool:
    return any((folder / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))
