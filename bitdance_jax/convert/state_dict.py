"""Reading and checking the tensors of published PyTorch networks (Inception, VGG16, …)."""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from bitdance_jax.convert import legacy_torch_file, safetensors_file, torch_file
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.io import readers
from bitdance_jax.io.lazy_array import LazyArray


StateDict = Mapping[str, np.ndarray | LazyArray]

LISTED = 10
"""Problems of each kind that a message lists; a file of another network has hundreds."""


def read(path: str | os.PathLike[str], fetch: str) -> StateDict:
    """The tensors of a file of torch.save, old or new, or of a .safetensors.

    Args:
      path: of the file.
      fetch: how to get the file, for messages: "fetch URL".

    Raises:
      FileError: no such file, or it holds no state dict.
    """
    try:
        readers.check_file(path)
    except readers.MissingFile as error:
        raise FileError(f"no weights at {os.fspath(path)}; {fetch}", path) from error
    if Path(path).suffix == ".safetensors":
        return safetensors_file.load(Path(path)).tensors
    is_legacy = legacy_torch_file.is_legacy(path)
    content = legacy_torch_file.load(path) if is_legacy else torch_file.load(path)
    if not isinstance(content, dict) or not all(
        isinstance(value, LazyArray) for value in content.values()
    ):
        raise FileError(f"{os.fspath(path)} holds no state dict; {fetch}", path)
    return content


def check(
    state: StateDict,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    unused: Callable[[str], bool] | Collection[str] = (),
) -> None:
    """Raises a UserError that lists missing, unknown and misshapen tensors, LISTED of each.

    Args:
      state: what was read.
      shapes: of the tensors that are needed.
      unused: names that may be there besides, or a function that says so.
    """
    ignored = unused if callable(unused) else unused.__contains__
    missing = [f"missing {key}" for key in sorted(shapes.keys() - state.keys())]
    unknown = [f"unknown {key}" for key in sorted(state.keys() - shapes.keys()) if not ignored(key)]
    misshapen = [
        f"{key} is {tuple(state[key].shape)} instead of {shapes[key]}"
        for key in sorted(shapes.keys() & state.keys())
        if tuple(state[key].shape) != tuple(shapes[key])
    ]
    problems = [line for lines in (missing, unknown, misshapen) for line in _first(lines)]
    if problems:
        raise UserError(", ".join(problems))


def _first(lines: list[str]) -> list[str]:
    rest = len(lines) - LISTED
    return [*lines[:LISTED], f"and {rest} more"] if rest > 0 else lines


def array(state: StateDict, key: str) -> np.ndarray:
    """A tensor as float64."""
    value = state[key]
    return (value.read() if isinstance(value, LazyArray) else value).astype(np.float64)


def convolution(state: StateDict, key: str) -> dict[str, np.ndarray]:
    """`kernel` [h, w, C, D] and `bias` [D] of `key`.weight [D, C, h, w] and `key`.bias, float32."""
    kernel = array(state, f"{key}.weight").transpose(2, 3, 1, 0)
    return {
        "kernel": kernel.astype(np.float32),
        "bias": array(state, f"{key}.bias").astype(np.float32),
    }


def folded_convolution(
    state: StateDict, key: str, norm: str, *, epsilon: float
) -> dict[str, np.ndarray]:
    """`kernel` and `bias`, float32, of a convolution without bias and the batch norm after it.

    Args:
      state: with `key`.weight [D, C, h, w] and the batch norm's tensors under `norm`.
      key: of the convolution.
      norm: of the batch norm.
      epsilon: of the batch norm.
    """
    scale = array(state, f"{norm}.weight") / np.sqrt(array(state, f"{norm}.running_var") + epsilon)
    bias = array(state, f"{norm}.bias") - array(state, f"{norm}.running_mean") * scale
    kernel = array(state, f"{key}.weight").transpose(2, 3, 1, 0) * scale
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def norm_shapes(norm: str, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a batch norm's tensors that matter to its output."""
    return {
        f"{norm}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")
    }
