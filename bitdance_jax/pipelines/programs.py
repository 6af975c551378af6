"""What sampling compiles, of sizes alone: pipelines run it, a plan only compiles it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, UInt8, UInt32

from bitdance_jax.config import (
    ClassConditionalConfig,
    Qwen3Config,
    TextToImageConfig,
    TransformerConfig,
)
from bitdance_jax.distributed.mesh import compiler_options
from bitdance_jax.models import class_conditional, text_to_image
from bitdance_jax.models.class_conditional import ClassConditional, with_unconditional
from bitdance_jax.models.text_to_image import TextToImage
from bitdance_jax.nn.attention import Kernel, choose_sampling_kernel
from bitdance_jax.pipelines.partial_images import values_to_codes
from bitdance_jax.pipelines.tokenizer import Codes, decode_on_mesh
from bitdance_jax.sampling.compiled import CompiledSampler, Inputs
from bitdance_jax.sampling.next_patch import PatchModel, Scales
from bitdance_jax.sampling.solvers import Solver
from bitdance_jax.tokenizer.autoencoder import Autoencoder


class Programs:
    """Jitted functions for a mesh.

    Attributes:
      sampler: its inputs are those of `read_labels` or `read_prompts`.
      to_codes: (values [N, B, P, K], number of sampled patches, kept ones, height=rows of tokens)
        -> codes [B, h, w, K]; see `values_to_codes`.
      decode: (the decoder's params, codes, the data of the images' keys) -> uint8 [B, H, W, 3].
    """

    def __init__(
        self,
        config: ClassConditionalConfig | TextToImageConfig,
        mesh: Mesh,
        dtype: jnp.dtype,
        kernel: Kernel | None = None,
        *,
        nested: bool = False,
    ) -> None:
        """
        Args:
          config: of the model.
          mesh: the devices.
          dtype: compute type.
          kernel: of attention; by default the one for the mesh's devices.
          nested: for use inside of a jitted function, which alone can have compiler options.
        """
        kernel = kernel or choose_sampling_kernel(
            dtype,
            block=config.tokens_per_step,
            head_dim=_transformer(config).head_dim,
            device=mesh.devices.flat[0],
        )
        self._mesh = mesh
        self._decoder = Autoencoder(config.tokenizer, dtype)
        if isinstance(config, ClassConditionalConfig):
            model = ClassConditional(config, dtype=dtype, kernel=kernel)
            read = functools.partial(read_labels, model)
            token_order = config.order
        else:
            read = functools.partial(read_prompts, TextToImage(config, dtype=dtype, kernel=kernel))
            token_order = "patch"
        self.sampler = CompiledSampler(read, mesh, nested=nested)
        to_codes = functools.partial(
            values_to_codes,
            patch_side=config.patch_side,
            token_order=token_order,
            latents=config.tokenizer.latents,
        )
        self.to_codes: Any = jax.jit(to_codes, static_argnames="height")
        options = None if nested else compiler_options(mesh)
        self.decode: Any = jax.jit(self._decode, compiler_options=options)

    def sample(
        self,
        params: Any,
        inputs: Inputs,
        keys: UInt32[Array | np.ndarray, "B 2"],
        *,
        solver: Solver,
        scales: Scales,
        num_patches: int,
        height: int,
    ) -> UInt8[Array, "B H W C"]:
        """Images of `height` rows of tokens. Returns before the devices have computed them."""
        options: Any = {"solver": solver, "scales": scales, "num_patches": num_patches}
        values = self.sampler.sample(params["model"], inputs, keys, **options)
        codes = self.to_codes(values, np.int32(num_patches), height=height)
        return self.decode(params["tokenizer"], codes, keys)

    def _decode(
        self, params: Any, codes: Codes, keys: UInt32[Array, "B 2"]
    ) -> UInt8[Array, "B H W C"]:
        return decode_on_mesh(self._decoder, params, codes, keys, self._mesh)


def _transformer(
    config: ClassConditionalConfig | TextToImageConfig,
) -> TransformerConfig | Qwen3Config:
    return config.transformer if isinstance(config, ClassConditionalConfig) else config.text


def read_labels(model: ClassConditional, params: Any, inputs: Inputs, scales: Scales) -> PatchModel:
    """The model after labels int [B], with unconditional rows where there are guidance scales.

    With weights the labels are [B, conditions].
    """
    labels = inputs.images if inputs.weights is None else _by_condition(inputs.images)
    if scales is not None:
        labels = with_unconditional(labels, model.config, len(inputs.images))
    return class_conditional.PatchReader(model, params, labels)


def read_prompts(model: TextToImage, params: Any, inputs: Inputs, scales: Scales) -> PatchModel:
    """The model after prompts, with unconditional rows where there are guidance scales.

    Args:
      inputs: images: `Prefixes` of the B prompts, and of the B unconditional ones, which show the
        same images; shared: (x, y) of the visual tokens. With weights, the prefixes of the prompts
        are [B, conditions, ...].
    """
    prefixes, unconditional = inputs.images
    if inputs.weights is not None:
        prefixes = jax.tree.map(_by_condition, prefixes)
    if scales is not None:
        prefixes = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), prefixes, unconditional)
    return text_to_image.PatchReader(model, params, prefixes, inputs.shared)


def _by_condition(array: Array | np.ndarray) -> Array:
    """[B, conditions, ...] -> rows: all images' first condition, their second one, ..."""
    return rearrange(jnp.asarray(array), "b c ... -> (c b) ...")
