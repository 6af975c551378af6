"""How weights are stored on the devices for sampling: types, shardings, quantization."""

import functools
import os
from collections.abc import Callable, Sequence
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

WeightType = Literal["float32", "bfloat16", "int8", "fp8", "int4"]
"""The type that weights are stored in. The last three (`bitdance_jax.nn.quantize`) are for most of
a released model's weights; the others are stored in the compute type."""


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
    """How a weight is stored.

    Attributes:
      sharding: of the weight.
      dtype: its type, before it is quantized.
      quantization: how it is quantized; None: it is not.
      parts: shardings of the quantized weight's arrays.
    """

    sharding: NamedSharding
    dtype: jnp.dtype
    quantization: quantize.Format | None = None
    parts: Any = None

    def store(self, path: Sequence[str], array: Array) -> Any:
        """What sampling keeps of a weight with this sharding and type."""
        if self.quantization is None:
            return array
        axis = quantize.input_axis("/".join(path))
        return _quantizer(self.quantization, axis, *jax.tree.leaves(self.parts))(array)


@functools.cache
def _quantizer(
    how: quantize.Format, axis: int, values: NamedSharding, scale: NamedSharding
) -> Callable[[Array], quantize.Quantized]:
    return jax.jit(
        functools.partial(quantize.quantize, how=how, axis=axis),
        out_shardings=quantize.Quantized(values, scale),
    )


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
    name = "/".join(path)
    spec = P() if replicated else sharding.parameter_spec(mesh, name, shape)
    how = None if replicated else quantize.chosen(name, weights)
    whole = dtype if weights in quantize.FORMATS else jnp.dtype(weights)
    stored = Stored(NamedSharding(mesh, spec), weight_dtype(path, whole), how)
    if how is None:
        return stored
    parts = quantize.abstract(jax.ShapeDtypeStruct(shape, stored.dtype), how, name)
    return stored._replace(
        parts=jax.tree.map(
            lambda part: NamedSharding(mesh, sharding.part_spec(mesh, name, shape, part.shape)),
            parts,
        )
    )


def place(mesh: Mesh, params: Params, dtype: jnp.dtype, weights: str) -> Params:
    """Puts weights {"model": stacked, "tokenizer"}, the same on all hosts, on the devices."""
    unstacked = {"model": unstack(params["model"]), "tokenizer": params["tokenizer"]}
    placed = {}
    for path, array in traverse_util.flatten_dict(unstacked).items():
        stored = stored_as(mesh, path, array.shape, dtype, weights)
        if stored is not None:
            array = jax.device_put(jnp.asarray(array, stored.dtype), stored.sharding)
            placed[path] = stored.store(path, array)
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
