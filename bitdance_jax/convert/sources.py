"""Opens a released file or folder and recognises the model in it. No tensor is read."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from bitdance_jax.convert import hub, release_folder, safetensors_file, torch_file
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.io import paths, readers
from bitdance_jax.io.lazy_array import LazyArray


Weights = Literal["ema", "model"]

UNTRAINED_TIMES = (0, 1)
"""Mean and deviation of the head's times in published files of the diffusers layout, by which the
models were not trained."""

OWN_RECORD = "bitdance_jax"
"""Name of the metadata entry in which `export` records config and metadata."""

Kind = Literal["tokenizer", "class_conditional", "text_to_image", "language_model"]

INNER_TOKENIZER = {"class_conditional": "vae.", "text_to_image": release_folder.PREFIXES["ae"]}
"""Prefixes of the keys of a model's own tokenizer."""

Tensors = dict[str, LazyArray]

TOKENIZER_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""Prefixes of a tokenizer's keys; the last two are of continuous latents."""

AVERAGED = "model_ema."
"""Prefix of averaged weights in files of PyTorch Lightning."""


class OwnRecord(TypedDict):
    """Config and metadata of the model folder that a file was exported from."""

    config: dict[str, Any]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A released file or folder.

    Attributes:
      path: the file with the tensors, or the folder.
      kind: of the model.
      tensors: the state dict.
      record: recorded with it: the release's arguments, a tokenizer's config, the configs of a
        text-to-image model by part, or a language model's config.
      own: config and metadata of the model folder that `export` wrote it from, or None.
      notes: lines to print.
      text_tokenizer: the folder of the tokenizer files of a text-to-image or language model.
      name: the Hugging Face id of a downloaded folder.
    """

    path: Path
    kind: Kind
    tensors: Tensors
    record: Mapping[str, Any]
    own: OwnRecord | None = None
    notes: tuple[str, ...] = ()
    text_tokenizer: Path | None = None
    name: str = ""


def open_source(source: str, weights: Weights = "ema") -> Source:
    """Opens a .pt or .safetensors file, the folder of a text-to-image or language model, or a
    Hugging Face id.

    A Hugging Face id is downloaded first.

    Raises:
      ConfigError: the file does not have the requested weights.
      FileError: it does not exist, or is not a released model.
    """
    path = paths.local(source)
    if path.exists():
        return _open_path(path, weights)
    opened = _open_path(hub.download(source), weights)
    return dataclasses.replace(opened, name=source) if opened.path.is_dir() else opened


def _open_path(path: Path, weights: Weights) -> Source:
    if path.is_dir():
        return _open_folder(path)
    if not readers.check_file(path).stat().length:
        raise FileError(f"{path} is empty; fetch it again", path)
    if safetensors_file.is_safetensors(path):
        return _open_safetensors(path, _config_beside(path))
    return _open_torch(path, weights)


def _open_folder(path: Path) -> Source:
    if (path / "config.json").is_file() and (path / "weights").is_dir():
        raise FileError(
            f"{path} is a model folder already; to='torch' writes it in the release's form", path
        )
    names = {f"{file.name}/" if file.is_dir() else file.name for file in path.iterdir()}
    if layout := release_folder.layout(names):
        return of_text_to_image(path, release_folder.load(path, layout))
    if release_folder.is_language_model(names):
        language_model = release_folder.load_language_model(path)
        return Source(
            path,
            "language_model",
            language_model.tensors,
            language_model.configs["text"],
            text_tokenizer=path,
        )
    if release_folder.is_class_conditional(names):
        return _class_conditional(path)
    tokenizers = [
        (path / folder / f"{release_folder.STEMS[0]}.safetensors", path / folder / "config.json")
        for folder in ("autoencoder", "")
    ]
    for weights, config in [*tokenizers, (path / "ae.safetensors", path / "ae_config.json")]:
        if weights.is_file():
            note = f"{path} has no language model: only its tokenizer is converted"
            notes = () if weights == tokenizers[1][0] else (note,)
            return _open_safetensors(weights, config, notes)
    files = sorted(file.name for file in path.iterdir() if file.suffix in (".pt", ".safetensors"))
    if not files:
        raise FileError(
            f"{path} has neither an autoencoder/ with weights nor .pt or .safetensors files", path
        )
    raise FileError(f"{path} is a folder; name one of its files: {', '.join(files)}", path)


def of_text_to_image(path: Path, release: release_folder.Release) -> Source:
    """The source in the folder of a text-to-image model."""
    return Source(
        path,
        "text_to_image",
        release.tensors,
        _tokenizer_record(release.configs["ae"]) | release.configs,
        _own_record(path, release.metadata),
        text_tokenizer=release.text_tokenizer,
    )


def _class_conditional(path: Path) -> Source:
    """A class-conditional model in the diffusers layout, with the keys and names of a .pt."""
    release = release_folder.load_class_conditional(path)
    record = dict(release.config)
    times = (record.pop("p_mean", None), record.pop("p_std", None))
    notes: tuple[str, ...] = ()
    if times == UNTRAINED_TIMES:
        notes = (
            f"{path} records the head's times as p_mean 0 and p_std 1, with which the published "
            "models were not trained; the paper's -0.8 and 0.8 are used",
        )
    else:
        names = ("P_mean", "P_std")
        record |= {name: x for name, x in zip(names, times, strict=True) if x is not None}
    prefix = INNER_TOKENIZER["class_conditional"]
    tensors = release.transformer | {
        prefix + key: array for key, array in release.autoencoder.items()
    }
    return Source(
        path,
        _kind(path, tensors),
        tensors,
        _tokenizer_record(release.autoencoder_config) | record,
        _own_record(path, release.metadata),
        notes,
    )


def _open_safetensors(path: Path, config: Path | None, notes: tuple[str, ...] = ()) -> Source:
    tensors, metadata = safetensors_file.load(path)
    record = {} if config is None or not config.is_file() else readers.read_json(config)
    return Source(
        path,
        _kind(path, tensors),
        tensors,
        _tokenizer_record(record),
        _own_record(path, metadata),
        notes,
    )


def _open_torch(path: Path, weights: Weights) -> Source:
    content = torch_file.load(path)
    if not isinstance(content, dict):
        raise FileError(f"{path} holds a {type(content).__name__}, not a state dict", path)
    notes: tuple[str, ...] = ()
    if "ema" in content or "model" in content:
        if weights == "ema" and _is_tokenizer(content.get("model")) and "ema" not in content:
            weights = "model"
        if weights not in content:
            other = "model" if weights == "ema" else "ema"
            raise ConfigError(f"{path} has no {weights} weights; try weights='{other}'", "weights")
        tensors = _tensors(path, content[weights])
        if _is_tokenizer(tensors):
            tensors, notes = _only_tokenizer(path, tensors, weights)
    elif "state_dict" in content:
        tensors = _tensors(path, content["state_dict"])
        if _is_tokenizer(tensors):
            tensors, notes = _only_tokenizer(path, tensors, weights)
    else:
        tensors = _tensors(path, content)
    record = content.get("args")
    record = record if isinstance(record, dict) else {}
    return Source(path, _kind(path, tensors), tensors, record, notes=notes)


def _is_tokenizer(state: Any) -> bool:
    return isinstance(state, dict) and "encoder.conv_in.weight" in state


def _only_tokenizer(
    path: Path, tensors: Tensors, weights: Weights
) -> tuple[Tensors, tuple[str, ...]]:
    """The tokenizer's tensors in a file of PyTorch Lightning, averaged ones where there are some.

    An averaged tensor has the key of the raw one without its dots, after AVERAGED. Other networks
    of the training, such as the discriminator, are dropped, with a note.
    """
    own = {key: array for key, array in tensors.items() if key.startswith(TOKENIZER_PARTS)}
    averaged = {key: f"{AVERAGED}{key.replace('.', '')}" for key in own}
    found = {key: tensors[name] for key, name in averaged.items() if name in tensors}
    notes = []
    if found:
        use = "are used" if weights == "ema" else "are ignored"
        notes.append(f"{path}: the averaged weights of {len(found)} of {len(own)} tensors {use}")
    others = [key for key in tensors if key not in own and not key.startswith(AVERAGED)]
    if others:
        notes.append(
            f"omitted {len(others)} keys that are not the tokenizer's, such as {others[0]}"
        )
    return (own | found if weights == "ema" else own), tuple(notes)


def _tensors(path: Path, state: Any) -> dict[str, LazyArray]:
    if not isinstance(state, dict):
        raise FileError(f"{path} has a {type(state).__name__} instead of a state dict", path)
    odd = [
        str(key)
        for key, value in state.items()
        if not isinstance(key, str) or not isinstance(value, LazyArray)
    ]
    if odd:
        raise FileError(
            f"{path} has entries in its state dict that are not tensors: {', '.join(odd[:20])}",
            path,
        )
    return state


def _kind(path: Path, keys: Iterable[str]) -> Kind:
    keys = list(keys)
    if "cls_embedding.weight" in keys:
        return "class_conditional"
    if "encoder.conv_in.weight" in keys:
        return "tokenizer"
    raise FileError(
        f"{path} is neither a class-conditional model nor a tokenizer;"
        f" its first keys are: {', '.join(keys[:5]) or 'none'}",
        path,
    )


def _config_beside(path: Path) -> Path | None:
    """The file `ae_d16c32_config.json` of `ae_d16c32.safetensors`, if it exists."""
    config = path.with_name(f"{path.stem}_config.json")
    return config if config.is_file() else None


def _tokenizer_record(record: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's config with its sizes under `ddconfig`; diffusers writes them flat."""
    return record if "ddconfig" in record else {**record, "ddconfig": record}


def _own_record(path: Path, metadata: Mapping[str, str]) -> OwnRecord | None:
    if OWN_RECORD not in metadata:
        return None
    own: OwnRecord = readers.decode_json(
        metadata[OWN_RECORD], OwnRecord, where=f"the record of its config in {path}"
    )
    return own
