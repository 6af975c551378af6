"""Weights of the FID Inception-v3, published by pytorch-fid and shared by torch-fidelity."""

import os
from typing import Any

import numpy as np
from flax import traverse_util

from bitdance_jax.convert import state_dict
from bitdance_jax.convert.state_dict import StateDict
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.fid.inception import abstract_params


PUBLISHED = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
BATCH_NORM_EPSILON = 1e-3


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parameters of `InceptionV3` from a torch file or a .safetensors with the published keys.

    Raises:
      FileError: no such file, not one of these formats, or other keys or shapes.
    """
    fetch = f"fetch {PUBLISHED}"
    state = state_dict.read(path, fetch)
    try:
        return convert(state)
    except UserError as error:
        raise FileError(
            f"{os.fspath(path)} does not hold the FID Inception-v3: {error}; {fetch}", path
        ) from None


def convert(state: StateDict) -> dict[str, Any]:
    """The state dict as nested float32 parameters, with batch norms folded into the convolutions.

    The classifier's bias and the counters of batches do not matter to the features and may be
    missing.

    Raises:
      UserError: a list of all keys that are missing, unknown or of the wrong shape.
    """
    kernels = {
        path[:-1]: leaf.shape
        for path, leaf in traverse_util.flatten_dict(abstract_params()).items()
        if path[-1] == "kernel"
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (*window, inputs, outputs) in kernels.items():
        shapes[".".join([*path, "weight"])] = (outputs, inputs, *window)
        if window:
            shapes |= state_dict.norm_shapes(_norm(path), outputs)
    state_dict.check(state, shapes, unused=_is_unused)

    params: dict[str, Any] = {}
    for path, (*window, _, _) in kernels.items():
        key = ".".join(path)
        if window:
            params[path] = state_dict.folded_convolution(
                state, key, _norm(path), epsilon=BATCH_NORM_EPSILON
            )
        else:
            kernel = state_dict.array(state, f"{key}.weight").T
            params[path] = {"kernel": kernel.astype(np.float32)}
    return traverse_util.unflatten_dict(params)


def _norm(path: tuple[str, ...]) -> str:
    """Key of the batch norm after the convolution at a path."""
    return ".".join([*path[:-1], "bn"])


def _is_unused(key: str) -> bool:
    return key == "fc.bias" or key.endswith(".num_batches_tracked")
