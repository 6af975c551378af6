"""What text-to-image sampling compiles, and how its weights are kept: of sizes alone. `TextToImage` runs it, a plan only compiles it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Int8, UInt8

from bitdance_jax import quantize, sharding
from bitdance_jax.config import SamplerConfig, TextToImageConfig
from bitdance_jax.flow_head.solver import num_noises
from bitdance_jax.models import text_to_image as model
from bitdance_jax.models.text_to_image import Prefixes
from bitdance_jax.sampling.next_patch import Drawing, NoiseSource, noise_from_keys
from bitdance_jax.sampling.pipeline import decode_codes, weight_dtype
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.transformer import order


class Programs:
    """Jitted functions for a mesh.

    Attributes:
      begin: the prefixes and the first patch: (params, prefixes, xy, keys, sampler=) -> Drawing; see `models.text_to_image.begin`.
      advance: (params, drawing, padding, xy, keys, stop, sampler=) -> the drawing up to `stop` patches, in the old one's memory.
      decode: (the decoder's params, codes in sequence order int8 [B, T, K], keys, height=rows of tokens) -> uint8 [B, H, W, 3].
    """

    def __init__(self, config: TextToImageConfig, mesh: Mesh, dtype: jnp.dtype) -> None:
        self._config, self._mesh, self._dtype = config, mesh, dtype
        self._module = model.TextToImage(config, dtype=dtype)
        self.begin = self._jit(self._begin, static_argnames="sampler")
        self.advance = self._jit(self._advance, static_argnames="sampler", donate_argnames="drawing")
        self.decode = self._jit(self._decode, static_argnames="height")

    def _jit(self, function: Callable[..., Any], **options: Any) -> Any:
        def on_mesh(*arguments: Any, **static: Any) -> Any:
            with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
                return function(*arguments, **static)

        return jax.jit(functools.wraps(function)(on_mesh), compiler_options=sharding.compiler_options(self._mesh), **options)

    def _noise(self, keys: Array, sampler: SamplerConfig) -> NoiseSource:
        return noise_from_keys(
            jax.random.wrap_key_data(keys), num_noises(sampler), self._config.tokens_per_step, self._config.tokenizer.bits
        )

    def _begin(self, params: Any, prefixes: Prefixes, xy: Array, keys: Array, *, sampler: SamplerConfig) -> Drawing:
        return model.begin(self._module, params, prefixes, xy, self._noise(keys, sampler), sampler)

    def _advance(
        self, params: Any, drawing: Drawing, padding: Array, xy: Array, keys: Array, stop: Int[Array, ""], *, sampler: SamplerConfig
    ) -> Drawing:
        return model.advance(self._module, params, drawing, padding, xy, self._noise(keys, sampler), sampler, stop)

    def _decode(self, params: Any, sequences: Int8[Array, "B T K"], keys: Array, *, height: int) -> UInt8[Array, "B H W 3"]:
        """Each device decodes some rows of the pictures, where it can."""
        codes = order.sequence_to_grid(sequences.astype(jnp.float32), height, self._config.patch_side, "patch").astype(jnp.int8)
        tokenizer = Autoencoder(self._config.tokenizer, self._dtype)
        return decode_codes(tokenizer, params, codes, jax.random.wrap_key_data(keys), self._mesh)


class Kept(NamedTuple):
    """How a weight is kept: where, as what, and whether it is then quantized."""

    place: NamedSharding
    dtype: jnp.dtype
    int8: bool


def kept(mesh: Mesh, path: Sequence[str], shape: tuple[int, ...], dtype: jnp.dtype, weights: str) -> Kept | None:
    """How the stored weight at a path such as ("model", "text", ...) is kept; None if sampling does not read it.

    Args:
      dtype: compute type.
      weights: "float32", "bfloat16" or "int8"; see `TextToImage`.
    """
    if tuple(path[:3]) == ("model", "text", "lm_head") or tuple(path[:2]) == ("tokenizer", "encoder"):
        return None
    # The decoder is small, and its activations are not: each device has it whole, and a part of the picture.
    spec = P() if path[0] == "tokenizer" else sharding.parameter_spec(mesh, "/".join(path), shape)
    int8 = weights == "int8" and quantize.QUANTIZED.search("/".join(path[1:])) is not None
    return Kept(NamedSharding(mesh, spec), weight_dtype(path, dtype if weights == "int8" else jnp.dtype(weights)), int8)
