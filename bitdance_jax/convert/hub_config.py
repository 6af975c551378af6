"""The config of a text-to-image model on the Hugging Face hub, without downloading its weights.

Config and tokenizer files are downloaded, and of each file of weights only the header, which has
the names and shapes of its tensors.
"""

import re
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import numpy as np

from bitdance_jax.config import TextToImageConfig
from bitdance_jax.convert import convert, hub, release_folder, sources
from bitdance_jax.convert.release_folder import PREFIXES, Part, Release
from bitdance_jax.errors import FileError
from bitdance_jax.io import readers
from bitdance_jax.io.lazy_array import LazyArray


def read(name: str) -> TextToImageConfig:
    """The config of the text-to-image model in the repository "owner/repository".

    Where the hub cannot be reached, it is that of the copy in the hub's cache.

    Raises:
      FileError: there is no such repository, it has no text-to-image model, or the model's files
        are incomplete or damaged.
    """
    if name.count("/") > 1:
        raise FileError(f"{name} is a file; a text-to-image model is a whole repository")
    with hub.hub_errors(name):
        files, cached = hub.list_files(name)
    layout = release_folder.layout(set(files))
    if layout is None:
        raise FileError(f"{name} is not a text-to-image model")
    if cached is not None:
        return convert.text_to_image_config(sources.open_source(name))
    parts: dict[str, Part] = {part: getattr(layout, part) for part in PREFIXES}
    weights = {part: _weights(files, where) for part, where in parts.items()}
    configs = {part: f"{x.folder}/{x.config}".lstrip("/") for part, x in parts.items() if x.config}
    missing = [f"weights of {part}" for part, found in weights.items() if not found]
    missing += sorted(set(configs.values()) - set(files))
    if missing:
        raise FileError(f"{name} is an incomplete text-to-image model: no {', '.join(missing)}")
    wanted = hub.text_to_image_files(files, layout)
    without_weights = [file for file in wanted if not file.endswith(".safetensors")]
    tensors: dict[str, LazyArray] = {}
    metadata: dict[str, str] = {}
    with hub.hub_errors(name):
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=without_weights))
        for part, prefix in PREFIXES.items():
            for file in weights[part]:
                header = huggingface_hub.parse_safetensors_file_metadata(name, file)
                for key, tensor in header.tensors.items():
                    tensors[prefix + key] = LazyArray(
                        tuple(tensor.shape), np.dtype(np.float32), _not_downloaded
                    )
                if part == "vision_head":
                    metadata = header.metadata
    records = {part: readers.read_json(folder / file) for part, file in configs.items()}
    release = Release(tensors, records, metadata, folder / layout.text_tokenizer)
    return convert.text_to_image_config(sources.of_text_to_image(folder, release))


def _weights(files: list[str], part: Part) -> list[str]:
    """The files with the weights of a part: its shards, or else the one file."""
    folder = f"{part.folder}/" if part.folder else ""
    for stem in part.stems:
        name = re.escape(folder + stem)
        shards = [file for file in files if re.fullmatch(rf"{name}-\d+-of-\d+\.safetensors", file)]
        if shards and f"{folder}{stem}.safetensors.index.json" in files:
            return shards
        if f"{folder}{stem}.safetensors" in files:
            return [f"{folder}{stem}.safetensors"]
    return []


def _not_downloaded(*_: int) -> NoReturn:
    raise AssertionError("the weights are not downloaded")
