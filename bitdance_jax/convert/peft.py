"""Adapters in the files of Hugging Face's PEFT: adapter_config.json, adapter_model.safetensors."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from bitdance_jax.config import LoraConfig, TextToImageConfig
from bitdance_jax.config.plain import require
from bitdance_jax.convert import keys, parameters, safetensors_file
from bitdance_jax.errors import FileError, short
from bitdance_jax.io import atomic, model_lookup, readers
from bitdance_jax.io.lazy_array import LazyArray
from bitdance_jax.io.progress import report
from bitdance_jax.models import text_to_image
from bitdance_jax.nn import lora as low_rank
from bitdance_jax.nn.stack import stacked_axes


Params = dict[str, Any]
ParamPath = tuple[str, ...]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base_fingerprint"
"""Entry of the metadata in WEIGHTS, which PEFT does not read."""
PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's layers."""

PLAIN = {
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}
"""Fields of a PEFT config by which layers compute something else, with the values that are read."""

CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the base model's weights too."""


class Adapters(NamedTuple):
    """An adapter of a text-to-image model.

    Attributes:
      config: rank, scale, and the layers' names.
      params: as of `nn.lora.initial`, stacked, numpy arrays in their stored types.
      base: fingerprint of the model that it was trained on (`model_lookup.fingerprint`); None if
        not known, as in PEFT's own files.
    """

    config: LoraConfig
    params: Params
    base: str | None = None


@dataclass(frozen=True)
class AdapterConfigFile:
    """The part of adapter_config.json that is read, besides PLAIN."""

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    init_lora_weights: bool | str = True


class Layer(NamedTuple):
    """The stacked linear layers of one kernel.

    Attributes:
      shape: of the kernel.
      modules: their names in the released files, by their index in the stack.
    """

    shape: tuple[int, ...]
    modules: dict[tuple[int, ...], str]


def adapted(config: TextToImageConfig, lora: LoraConfig) -> dict[ParamPath, tuple[int, ...]]:
    """Paths and shapes of the kernels that the targets name, for `nn.lora.initial`.

    Raises:
      ConfigError: a target names no linear layer, or only some of a stack's; or the rank is larger
        than a layer.
    """
    layers = _linear_layers(config)
    names = [name for layer in layers.values() for name in layer.modules.values()]
    for target in lora.targets:
        require(
            any(_matches(name, (target,)) for name in names),
            f"lora.targets {target} is no linear layer of the model; its layers are "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in names}))}",
            "lora.targets",
        )
    found = {}
    for path, layer in layers.items():
        matching = [name for name in layer.modules.values() if _matches(name, lora.targets)]
        if not matching:
            continue
        require(
            len(matching) == len(layer.modules),
            f"lora.targets name {matching[0]} and not the same layer of all blocks; give the last "
            f"part of the name, such as {matching[0].rpartition('.')[2]}",
            "lora.targets",
        )
        _check_rank(layer.shape[stacked_axes(path) :], lora.rank, matching[0])
        found[path] = layer.shape
    return found


def save(
    folder: str, adapters: Adapters, config: TextToImageConfig, *, base: str, force: bool = False
) -> None:
    """Writes an adapter as a folder of PEFT's, completely or not at all.

    Args:
      folder: new, or with `force` an adapter to be replaced.
      adapters: see `Adapters`.
      config: of the base model.
      base: name of the base model, for users.

    Raises:
      FileError: it holds something else, or cannot be written.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not force or not (path / CONFIG).is_file():
            raise FileError(f"{path} exists; choose a new folder", path)
    tensors = _to_peft(adapters.params, config)
    with atomic.replace_folder(path, sum(array.nbytes for array in tensors.values())) as new:
        record = _record(adapters.config, base)
        (new / CONFIG).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        known = {} if adapters.base is None else {BASE: adapters.base}
        safetensors_file.save(new / WEIGHTS, tensors, {"format": "pt"} | known)


def load(folder: str, config: TextToImageConfig) -> Adapters:
    """Reads an adapter of a text-to-image model with this config.

    Args:
      folder: of the adapter, or of the training run that wrote it.
      config: of the base model.

    Raises:
      FileError: there is none, it is of another method or of another base model (the message lists
        the wrong keys), or damaged.
    """
    path = Path(folder)
    if (path / "model" / CONFIG).is_file():
        path = path / "model"
    if not (path / CONFIG).is_file():
        raise FileError(f"{path} is no LoRA adapter: it has no {CONFIG}", path)
    record = _read_config(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        raise FileError(
            f"{path} has no {WEIGHTS}; save the adapter with safe_serialization=True", path
        )
    tensors, metadata = safetensors_file.load(path / WEIGHTS)
    layers = {
        layer_path: layer
        for layer_path, layer in _linear_layers(config).items()
        if any(f"{PREFIX}{name}.lora_A.weight" in tensors for name in layer.modules.values())
    }
    _check_tensors(path, tensors, layers, config, record.r)
    scale = record.lora_alpha / (record.r**0.5 if record.use_rslora else record.r)
    modules = [name for layer in layers.values() for name in layer.modules.values()]
    targets = sorted({name.rpartition(".")[2] for name in modules})
    lora = LoraConfig(record.r, scale * record.r, tuple(targets))
    return Adapters(lora, _from_peft(tensors, layers, record.r), metadata.get(BASE))


def report_other_base(adapters: Adapters, folder: str, model: str) -> None:
    """Says on stderr if an adapter was trained on another model of the same sizes.

    Args:
      adapters: of `load`.
      folder: that it was read from.
      model: folder of the model that it is used with.
    """
    if adapters.base is not None and adapters.base != model_lookup.fingerprint(model):
        report(
            f"note: the adapter {folder} was trained on another model than {model}; give that as "
            "the model, or expect worse images"
        )


@functools.cache
def _linear_layers(config: TextToImageConfig) -> dict[ParamPath, Layer]:
    """All linear layers of a model, by the paths of their kernels."""
    table = keys.text_to_image(config)
    layers = {}
    for path, leaf in traverse_util.flatten_dict(text_to_image.abstract_params(config)).items():
        if path[-1] == "kernel":
            modules = {
                index: keys.release_key(layer, table)[0].removesuffix(".weight")
                for index, layer in parameters.layers(path, leaf.shape)
            }
            layers[path] = Layer(leaf.shape, modules)
    return layers


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_rank(kernel: tuple[int, ...], rank: int, name: str) -> None:
    smallest = min(kernel[0], int(np.prod(kernel[1:])))
    require(
        rank <= smallest,
        f"lora.rank {rank} is larger than the layer {name}, {kernel[0]} x "
        f"{int(np.prod(kernel[1:]))}",
        "lora.rank",
    )


def _record(lora: LoraConfig, base: str) -> dict[str, Any]:
    return {
        **PLAIN,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.rank,
        "revision": None,
        "target_modules": list(lora.targets),
        "task_type": None,
        "use_rslora": False,
    }


def _read_config(path: Path) -> AdapterConfigFile:
    content = readers.read_json(path)
    method = content.get("peft_type", "LORA")
    if method != "LORA":
        raise FileError(f"{path} is of the method {short(method)}, and only LORA is read", path)
    odd = [
        f"{name} {short(content[name])}"
        for name, plain in PLAIN.items()
        if content.get(name, plain) not in (plain, None)
    ]
    config: AdapterConfigFile = readers.validate(content, AdapterConfigFile, where=str(path))
    start = str(config.init_lora_weights)
    if start.startswith(CHANGED_BASE):
        odd.append(f"init_lora_weights {start}, which changes the base model")
    if config.r < 1:
        odd.append(f"r {config.r}")
    if odd:
        raise FileError(f"{path} is not a plain LoRA adapter: it has {', '.join(odd)}", path)
    return config


def _check_tensors(
    path: Path,
    tensors: Mapping[str, LazyArray],
    layers: Mapping[ParamPath, Layer],
    config: TextToImageConfig,
    rank: int,
) -> None:
    expected = {}
    for layer_path, layer in layers.items():
        inputs, *outputs = layer.shape[stacked_axes(layer_path) :]
        for name in layer.modules.values():
            expected[f"{PREFIX}{name}.lora_A.weight"] = (rank, inputs)
            expected[f"{PREFIX}{name}.lora_B.weight"] = (int(np.prod(outputs)), rank)
    problems = [f"unknown key {key}" for key in tensors if key not in expected]
    problems += [f"missing key {key}" for key in expected if key not in tensors]
    problems += [
        f"{key} has the shape {list(tensors[key].shape)}, the model needs {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if not tensors:
        problems = [f"{WEIGHTS} is empty"]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise FileError(
            f"the adapter {path} is of another model than this one ({config.text.num_layers} layers"
            f" of width {config.text.dim}): {'; '.join(problems[:20])}{more}",
            path,
        )


def _to_peft(adapters: Params, config: TextToImageConfig) -> dict[str, LazyArray]:
    flat = traverse_util.flatten_dict(adapters)
    layers = _linear_layers(config)
    tensors = {}
    for *parents, leaf in flat:
        array = flat[*parents, leaf]
        letter = "A" if leaf == low_rank.A else "B"
        for index, name in layers[*parents, "kernel"].modules.items():
            matrix = np.asarray(array[index])
            matrix = matrix.reshape(matrix.shape[0], -1).T
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = LazyArray(
                matrix.shape, matrix.dtype, functools.partial(np.asarray, matrix)
            )
    return dict(sorted(tensors.items()))


def _from_peft(
    tensors: Mapping[str, LazyArray], layers: Mapping[ParamPath, Layer], rank: int
) -> Params:
    adapters = {}
    for path, layer in layers.items():
        stack = layer.shape[: stacked_axes(path)]
        inputs, *outputs = layer.shape[len(stack) :]
        a = np.empty((*stack, inputs, rank), np.float32)
        b = np.empty((*stack, rank, *outputs), np.float32)
        for index, name in layer.modules.items():
            a[index] = tensors[f"{PREFIX}{name}.lora_A.weight"].read().T
            b[index] = tensors[f"{PREFIX}{name}.lora_B.weight"].read().T.reshape(rank, *outputs)
        adapters[*path[:-1], low_rank.A] = a
        adapters[*path[:-1], low_rank.B] = b
    return traverse_util.unflatten_dict(adapters)
