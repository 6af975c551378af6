"""What there is to convert: recognised from its contents, its tensors listed without reading them."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors

from bitdance_jax.convert import hub, torch_file
from bitdance_jax.convert.lazy import LazyArray
from bitdance_jax.errors import UserError


Weights = Literal["ema", "model"]

OWN_RECORD = "bitdance_jax"
"""Name under which `export` notes config and metadata in a .safetensors file."""

SAFETENSORS_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Source:
    """A released file or folder.

    Attributes:
      path: the file that has the tensors.
      kind: what they are.
      tensors: the state dict.
      record: what was noted with them: the release's arguments, a tokenizer's config.
      own: config and metadata of the model folder that `export` wrote the file from.
      notes: lines for the user.
    """

    path: Path
    kind: Literal["class_conditional", "tokenizer"]
    tensors: dict[str, LazyArray]
    record: Mapping[str, Any]
    own: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def open_source(source: str, weights: Weights = "ema") -> Source:
    """Opens a .pt file, a .safetensors file, a text-to-image folder (its tokenizer), or a Hugging Face id, which is downloaded first.

    Raises:
      UserError: no such thing, or nothing that can be converted.
    """
    path = Path(source)
    if not path.exists():
        path = hub.download(source)
    if path.is_dir():
        return _open_folder(path)
    if not path.stat().st_size:
        raise UserError(f"{path} is empty; fetch it again")
    return _open_safetensors(path, _config_beside(path)) if _is_safetensors(path) else _open_torch(path, weights)


def _open_folder(path: Path) -> Source:
    """A text-to-image release: in the diffusers layout, or the plain one."""
    note = f"only the tokenizer in {path} is converted; the text-to-image parts come in a later version"
    tokenizers = [
        (path / "autoencoder" / "diffusion_pytorch_model.safetensors", path / "autoencoder" / "config.json"),
        (path / "diffusion_pytorch_model.safetensors", path / "config.json"),
        (path / "ae.safetensors", path / "ae_config.json"),
    ]
    for weights, config in tokenizers:
        if weights.is_file():
            notes = () if weights.name.startswith("diffusion") and weights.parent == path else (note,)
            return _open_safetensors(weights, config, notes)
    if (path / "config.json").is_file() and (path / "weights").is_dir():
        raise UserError(f"{path} is a model folder already; --to torch writes it as a .safetensors file")
    files = sorted(file.name for file in path.iterdir() if file.suffix in (".pt", ".safetensors"))
    if not files:
        raise UserError(f"{path} has neither an autoencoder/ with weights nor .pt or .safetensors files; nothing to convert")
    raise UserError(f"{path} is a folder; name one of its files: {', '.join(files)}")


def _open_safetensors(path: Path, config: Path | None, notes: tuple[str, ...] = ()) -> Source:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            slices = {key: file.get_slice(key) for key in file.keys()}
            headers = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read; it is cut short or damaged ({error})") from error
    if twice := _duplicates(path):
        raise UserError(f"{path} has a second key {', a second key '.join(twice)}")
    odd = [f"{key} is {dtype}" for key, (_, dtype) in headers.items() if dtype not in SAFETENSORS_DTYPES]
    if odd:
        raise UserError(f"{path} has numbers that no released model has: {', '.join(odd)}")

    def tensor(key: str) -> LazyArray:
        def read() -> np.ndarray:
            with safetensors.safe_open(path, framework="np") as file:
                return file.get_tensor(key)

        shape, dtype = headers[key]
        return LazyArray(shape, np.dtype(SAFETENSORS_DTYPES[dtype]), read)

    tensors = {key: tensor(key) for key in headers}
    return Source(path, _kind(path, tensors), tensors, _read_json(config), _own_record(path, metadata), notes)


def _open_torch(path: Path, weights: Weights) -> Source:
    content = torch_file.load(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    notes: tuple[str, ...] = ()
    if "ema" in content or "model" in content:
        if weights not in content:
            raise UserError(f"{path} has no {weights} weights; try --weights {'model' if weights == 'ema' else 'ema'}")
        tensors = _tensors(path, content[weights])
    elif "state_dict" in content:
        tensors = _tensors(path, content["state_dict"])
        if "encoder.conv_in.weight" in tensors:  # the training's other networks may lie beside the tokenizer
            others = [key for key in tensors if not key.startswith(("encoder.", "decoder."))]
            tensors = {key: array for key, array in tensors.items() if key not in set(others)}
            notes = (f"left out {len(others)} keys that are not the tokenizer's, such as {others[0]}",) if others else ()
    else:
        tensors = _tensors(path, content)
    record = content.get("args")
    return Source(path, _kind(path, tensors), tensors, record if isinstance(record, dict) else {}, notes=notes)


def _tensors(path: Path, state: Any) -> dict[str, LazyArray]:
    if not isinstance(state, dict):
        raise UserError(f"{path} has a {type(state).__name__} where its state dict should be")
    odd = [str(key) for key, value in state.items() if not isinstance(key, str) or not isinstance(value, LazyArray)]
    if odd:
        raise UserError(f"{path} has things in its state dict that are not tensors: {', '.join(odd[:20])}")
    return state


def _kind(path: Path, keys: Iterable[str]) -> Literal["class_conditional", "tokenizer"]:
    keys = list(keys)
    if "cls_embedding.weight" in keys:
        return "class_conditional"
    if "encoder.conv_in.weight" in keys:
        return "tokenizer"
    raise UserError(f"{path} is neither a class-conditional model nor a tokenizer; its first keys are: {', '.join(keys[:5]) or 'none'}")


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def _config_beside(path: Path) -> Path | None:
    """`ae_d16c32_config.json` for `ae_d16c32.safetensors`."""
    config = path.with_name(f"{path.stem}_config.json")
    return config if config.is_file() else None


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is not a tokenizer's config: it must be an object")
    # The sizes lie under `ddconfig`, or flat as diffusers writes them.
    return record if "ddconfig" in record else {**record, "ddconfig": record}


def _duplicates(path: Path) -> list[str]:
    """Keys that a .safetensors file has twice, which its library overlooks."""
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    counts = Counter(key for key, _ in json.loads(header, object_pairs_hook=list))
    return [key for key, count in counts.items() if count > 1]


def _own_record(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if OWN_RECORD not in metadata:
        return None
    try:
        own = json.loads(metadata[OWN_RECORD])
    except ValueError as error:
        raise UserError(f"{path} has a damaged record of its config ({error})") from error
    if not isinstance(own, dict) or not all(isinstance(own.get(name), dict) for name in ("config", "metadata")):
        raise UserError(f"{path} has a damaged record of its config")
    return own
