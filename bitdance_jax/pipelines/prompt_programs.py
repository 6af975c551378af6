"""What text-to-image sampling compiles, and how its weights are kept: of sizes alone. `TextToImage` runs it, a plan only compiles it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int8, UInt8

from bitdance_jax.config import TextToImageConfig
from bitdance_jax.distributed import sharding
from bitdance_jax.models import text_to_image as model
from bitdance_jax.models.text_to_image import Prefixes
from bitdance_jax.nn import quantize
from bitdance_jax.pipelines.class_conditional import decode_codes, weight_dtype
from bitdance_jax.sampling.compiled import CompiledSampler
from bitdance_jax.sampling.next_patch import PatchModel, Scales
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.transformer import order


class Programs(CompiledSampler):
    """Jitted functions for a mesh: the sampler's, whose inputs are (prefixes, xy), and the decoder.

    Attributes:
      decode: (the decoder's params, codes in sequence order int8 [B, T, K], keys, height=rows of tokens) -> uint8 [B, H, W, 3].
    """

    def __init__(self, config: TextToImageConfig, mesh: Mesh, dtype: jnp.dtype) -> None:
        self._config, self._dtype = config, dtype
        module = model.TextToImage(config, dtype=dtype)

        def read(params: Any, inputs: tuple[Prefixes, Array], scales: Scales) -> PatchModel:
            return model.PatchReader(module, params, *inputs)

        super().__init__(read, mesh)
        self.decode = self._jit(self._decode, static_argnames="height")

    def _decode(
        self, params: Any, sequences: Int8[Array, "B T K"], keys: Array, *, height: int
    ) -> UInt8[Array, "B H W 3"]:
        """Each device decodes some rows of the images, where it can."""
        codes = order.sequence_to_grid(
            sequences.astype(jnp.float32), height, self._config.patch_side, "patch"
        ).astype(jnp.int8)
        tokenizer = Autoencoder(self._config.tokenizer, self._dtype)
        return decode_codes(tokenizer, params, codes, jax.random.wrap_key_data(keys), self._mesh)


class Kept(NamedTuple):
    """How a weight is kept: where, as what, and whether it is then quantized."""

    place: NamedSharding
    dtype: jnp.dtype
    int8: bool


def kept(
    mesh: Mesh, path: Sequence[str], shape: tuple[int, ...], dtype: jnp.dtype, weights: str
) -> Kept | None:
    """How the stored weight at a path such as ("model", "text", ...) is kept; None if sampling does not read it.

    Args:
      dtype: compute type.
      weights: "float32", "bfloat16" or "int8"; see `TextToImage`.
    """
    if tuple(path[:3]) == ("model", "text", "lm_head") or tuple(path[:2]) == (
        "tokenizer",
        "encoder",
    ):
        return None
    # The decoder is small, and its activations are not: each device has it whole, and a part of the image.
    spec = P() if path[0] == "tokenizer" else sharding.parameter_spec(mesh, "/".join(path), shape)
    int8 = weights == "int8" and quantize.QUANTIZED.search("/".join(path[1:])) is not None
    return Kept(
        NamedSharding(mesh, spec),
        weight_dtype(path, dtype if weights == "int8" else jnp.dtype(weights)),
        int8,
    )
