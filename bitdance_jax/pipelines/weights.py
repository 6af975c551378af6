"""How weights are stored on the devices for sampling: types, shardings, quantization."""

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from bitdance_jax.distributed import sharding
from bitdance_jax.io import model_folder, model_lookup
from bitdance_jax.nn import quantize
from bitdance_jax.nn.stack import unstack
from bitdance_jax.perf import hardware


Params = dict[str, Any]

WeightType = Literal["float32", "bfloat16", "int8"]
"""The type that weights are stored in; "int8" (`bitdance_jax.nn.quantize`) is for all but 5 % of a
released model's weights, and the others are stored in the compute type."""


def weight_dtype(path: Sequence[str], dtype: DTypeLike) -> jnp.dtype:
    """The type in which sampling stores the weight at a path: the compute type.

    Those of norms stay float32, in which norms compute: otherwise each would be converted again at
    every step of the head. So do the class-conditional models' embeddings, which enter the residual
    stream without a product.
    """
    embeddings = ("class_embedding", "query_tokens", "position_embedding")
    wide = any("norm" in name or name in embeddings for name in path)
    return jnp.dtype(jnp.float32 if wide else dtype)


def sampling_params(params: Params, dtype: DTypeLike) -> Params:
    """Stacked parameters of a model as it samples on one device: unstacked, in `weight_dtype`."""

    def convert(path: tuple[Any, ...], array: Any) -> Array:
        return jnp.asarray(array, weight_dtype([part.key for part in path], dtype))

    return jax.tree_util.tree_map_with_path(convert, unstack(params))


class Stored(NamedTuple):
    """How a weight is stored: its sharding, its type, and whether it is then quantized."""

    sharding: NamedSharding
    dtype: jnp.dtype
    int8: bool


def stored_as(
    mesh: Mesh, path: Sequence[str], shape: tuple[int, ...], dtype: jnp.dtype, weights: str
) -> Stored | None:
    """How the weight at a path such as ("model", "text", ...) is stored; None: sampling omits it.

    Args:
      dtype: compute type.
      weights: a `WeightType`.
    """
    if tuple(path[:3]) == ("model", "text", "lm_head"):
        return None
    if tuple(path[:2]) == ("tokenizer", "encoder"):
        return None
    # The decoder is small, but its activations are not: it is replicated, and the image sharded.
    replicated = path[0] == "tokenizer"
    spec = P() if replicated else sharding.parameter_spec(mesh, "/".join(path), shape)
    int8 = weights == "int8" and quantize.QUANTIZED.search("/".join(path[1:])) is not None
    stored = dtype if weights == "int8" else jnp.dtype(weights)
    return Stored(NamedSharding(mesh, spec), weight_dtype(path, stored), int8)


def place(mesh: Mesh, params: Params, dtype: jnp.dtype, weights: str) -> Params:
    """Puts weights {"model": stacked, "tokenizer"}, the same on all hosts, on the devices."""
    unstacked = {"model": unstack(params["model"]), "tokenizer": params["tokenizer"]}
    placed = {}
    for path, array in traverse_util.flatten_dict(unstacked).items():
        stored = stored_as(mesh, path, array.shape, dtype, weights)
        if stored is not None:
            array = jax.device_put(jnp.asarray(array, stored.dtype), stored.sharding)
            placed[path] = quantize.quantize(array) if stored.int8 else array
    return traverse_util.unflatten_dict(placed)


def read(folder: str | os.PathLike[str], abstract: Any, dtype: DTypeLike) -> Params:
    """The weights of a model folder or a training run as numpy arrays.

    Args:
      abstract: the shapes that they must have.
      dtype: compute type; a device must be able to hold them in it.

    Raises:
      UserError: other shapes, damaged files, or too little memory.
    """
    converted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), abstract)
    hardware.check_fits(converted, f"the model in {os.fspath(folder)}")
    params = model_lookup.load(folder).params
    model_folder.check_shapes(folder, params, abstract)
    return params
