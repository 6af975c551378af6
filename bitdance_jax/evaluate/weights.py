"""The published weights of the FID Inception-v3 (pytorch-fid's file, which torch-fidelity shares) as our parameters."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bitdance_jax.convert import legacy_torch_file, safetensors_file, torch_file
from bitdance_jax.errors import UserError
from bitdance_jax.evaluate.inception import InceptionV3
from bitdance_jax.io import readers
from bitdance_jax.io.lazy_array import LazyArray


PUBLISHED = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
EPSILON = 1e-3
"""Of the batch norms."""


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parameters of `InceptionV3` from a torch file or a .safetensors with the published keys.

    Raises:
      UserError: no such file, not one of these formats, or other keys or shapes.
    """
    try:
        readers.check_file(path)
    except readers.MissingFile as error:
        raise UserError(f"no Inception weights at {os.fspath(path)}; fetch {PUBLISHED}") from error
    state = (
        safetensors_file.load(Path(path)).tensors
        if Path(path).suffix == ".safetensors"
        else _read_torch(path)
    )
    try:
        return convert(state)
    except UserError as error:
        raise UserError(
            f"{os.fspath(path)} does not hold the FID Inception-v3: {error}; fetch {PUBLISHED}"
        ) from None


def convert(state: Mapping[str, np.ndarray | LazyArray]) -> dict[str, Any]:
    """The state dict's arrays as nested float32 parameters; each batch norm is folded, in float64, into the convolution before it.

    Neither the classifier's bias nor counters of batches matter to the features, and both may be missing.

    Raises:
      UserError: one list of all keys that are missing, unknown or of the wrong shape.
    """
    abstract = jax.eval_shape(
        InceptionV3().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8)
    )["params"]
    paths = {
        path[:-1]: leaf.shape
        for path, leaf in traverse_util.flatten_dict(abstract).items()
        if path[-1] == "kernel"
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (*window, width_in, width_out) in paths.items():
        shapes[".".join([*path, "weight"])] = (width_out, width_in, *window)
        if window:
            norm = ".".join([*path[:-1], "bn"])
            shapes |= {
                f"{norm}.{name}": (width_out,)
                for name in ("weight", "bias", "running_mean", "running_var")
            }
    _check(state, shapes)

    params = {}
    for path, (*window, _, _) in paths.items():
        weight = _array(state[".".join([*path, "weight"])])
        if not window:
            params[(*path, "kernel")] = weight.T.astype(np.float32)
            continue
        norm = ".".join([*path[:-1], "bn"])
        scale, bias, mean, variance = (
            _array(state[f"{norm}.{name}"])
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = scale / np.sqrt(variance + EPSILON)
        params[(*path, "kernel")] = (weight.transpose(2, 3, 1, 0) * scale).astype(np.float32)
        params[(*path, "bias")] = (bias - mean * scale).astype(np.float32)
    return traverse_util.unflatten_dict(params)


def _check(state: Mapping[str, np.ndarray | LazyArray], shapes: dict[str, tuple[int, ...]]) -> None:
    unused = {key for key in state if key == "fc.bias" or key.endswith(".num_batches_tracked")}
    problems = [f"missing {key}" for key in sorted(shapes.keys() - state.keys())]
    problems += [f"unknown {key}" for key in sorted(state.keys() - shapes.keys() - unused)]
    for key in sorted(shapes.keys() & state.keys()):
        if tuple(state[key].shape) != shapes[key]:
            problems.append(f"{key} is {tuple(state[key].shape)} instead of {shapes[key]}")
    if problems:
        raise UserError(", ".join(problems))


def _array(value: np.ndarray | LazyArray) -> np.ndarray:
    return (value.read() if isinstance(value, LazyArray) else value).astype(np.float64)


def _read_torch(path: str | os.PathLike[str]) -> dict[str, LazyArray]:
    content = (
        legacy_torch_file.load(path) if legacy_torch_file.is_legacy(path) else torch_file.load(path)
    )
    if not isinstance(content, dict) or not all(
        isinstance(value, LazyArray) for value in content.values()
    ):
        raise UserError(f"{os.fspath(path)} holds no state dict; fetch {PUBLISHED}")
    return content
