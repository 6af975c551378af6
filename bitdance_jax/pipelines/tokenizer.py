"""Images to latents and back, with the weights of a model folder; numpy in, numpy out."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int8, Num, UInt8, UInt32

from bitdance_jax.config import (
    ClassConditionalConfig,
    TextToImageConfig,
    TokenizerConfig,
    from_dict,
)
from bitdance_jax.distributed.mesh import AXES, BATCH
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.io import image_files, model_folder, model_lookup
from bitdance_jax.io.model_lookup import EMBEDDED, UnfinishedRun
from bitdance_jax.pipelines import checks, weights
from bitdance_jax.pipelines.batching import Seeds, chunks, image_keys
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.sampling.compiled import splits_images
from bitdance_jax.tokenizer import autoencoder, strips
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.codes import code_dtype, to_latents


Params = Any

Codes = Int8[Array, "B h w K"] | Float32[Array, "B h w K"]
"""Bits in {-1, 1}, or continuous latents."""

CHUNK_PIXELS = 2**20
"""Pixels that the tokenizer handles at a time, to bound memory: four images of 512 x 512."""


class Tokenizer:
    """Images to bits, or to continuous latents, and back.

    Attributes:
      config: sizes.
      dtype: compute type.
      params: weights {"encoder", "decoder"}.
    """

    def __init__(
        self,
        config: TokenizerConfig,
        params: Params | Callable[[], Params],
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        """
        Args:
          params: the weights, or a function that reads them when they are first needed.
          dtype: compute type, which the weights are converted to.
        """
        self.config = config
        self.dtype = checks.compute_type(dtype)
        self._read = params if callable(params) else None
        self._params = None if callable(params) else self._converted(params)
        model = Autoencoder(config, self.dtype)

        def encode(params: Params, images: UInt8[Array, "B H W C"]) -> Codes:
            z: Any = model.apply({"params": params}, image_files.to_model(images), method="encode")
            codes = to_latents(z, config.latents)
            return codes.astype(code_dtype(config.latents))

        def decode(params: Params, codes: Array, keys: Array) -> Array:
            return decode_codes(model, params, codes, keys)

        self._encode = jax.jit(encode)
        self._decode = jax.jit(decode)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str] = EMBEDDED, *, dtype: DTypeLike = jnp.float32
    ) -> "Tokenizer":
        """The tokenizer in the folder of a tokenizer, or of a model of any kind.

        Args:
          folder: a model folder, local or gs://, the folder of a training run, "emoji" or
            "emoji_classes", the embedded models, or a Hugging Face id, as `bitdance_jax.load`.
          dtype: compute type.

        Raises:
          UserError: no such folder, or a damaged one.
        """
        dtype = checks.compute_type(dtype)
        folder = local_folder(folder)
        described = model_lookup.read_config(folder)
        where = f"{folder}/config.json: config"
        if described.kind == "tokenizer":
            config = from_dict(TokenizerConfig, described.config, where)
            return cls(
                config, weights.read(folder, autoencoder.abstract_params(config), dtype), dtype
            )
        if described.kind == "language_model":
            raise FileError(
                f"{folder} holds a language model, which has no image tokenizer", folder
            )
        kinds: Any = {
            "class_conditional": ClassConditionalConfig,
            "text_to_image": TextToImageConfig,
        }
        config = from_dict(kinds[described.kind], described.config, where).tokenizer
        found = model_lookup.locate(folder)
        if isinstance(found, UnfinishedRun):
            params = found.load().params["tokenizer"]
        else:
            read = lambda path, array: array[...] if path[0] == "tokenizer" else None  # noqa: E731
            params = model_folder.load(found, read_array=read).params["tokenizer"]
        model_folder.check_shapes(folder, params, autoencoder.abstract_params(config))
        return cls(config, params, dtype)

    @property
    def params(self) -> Params:
        if self._params is None:
            assert self._read is not None
            self._params = self._converted(self._read())
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self._params = params

    def encode(
        self, images: UInt8[np.ndarray, "B H W C"]
    ) -> Int8[np.ndarray, "B h w K"] | Float32[np.ndarray, "B h w K"]:
        """Codes in {-1, 1} of images whose sides are divisible by `config.downsampling`.

        Those of continuous latents are float32, with a standard deviation of about 1.

        Raises:
          UserError: images of another type or shape.
        """
        images = checks.images(images, self.config)
        height, width = images.shape[1:3]
        if not len(images):
            down = self.config.downsampling
            dtype = code_dtype(self.config.latents)
            return np.zeros((0, height // down, width // down, self.config.bits), dtype)
        if "encoder" not in self.params:
            raise UserError("these weights have no encoder: the tokenizer can only decode")
        chunk = chunk_size(height, width)
        return np.concatenate(
            [self._encode(self.params, part)[:count] for part, count in chunks(images, chunk)]
        )

    def decode(
        self, codes: Num[np.ndarray, "B h w K"], seed: Seeds = 0, first_index: int = 0
    ) -> UInt8[np.ndarray, "B H W C"]:
        """Images of codes.

        Args:
          codes: -1 or 1, or continuous latents.
          seed, first_index: of the noise of a GAN decoder, as those of `Pipeline.sample`.

        Raises:
          UserError: codes of another shape or with other values, a seed or index out of range.
        """
        codes = checks.codes(codes, self.config)
        height, width = (side * self.config.downsampling for side in codes.shape[1:3])
        if not len(codes):
            return np.zeros((0, height, width, self.config.image_channels), np.uint8)
        keys = image_keys(seed, first_index, len(codes))
        chunk = chunk_size(height, width)
        pairs = zip(chunks(codes, chunk), chunks(keys, chunk), strict=True)
        return np.concatenate(
            [
                self._decode(self.params, part, part_keys)[:count]
                for (part, count), (part_keys, _) in pairs
            ]
        )

    def _converted(self, params: Params) -> Params:
        return jax.tree.map(lambda a: jnp.asarray(a, self.dtype), params)


def decode_codes(
    tokenizer: Autoencoder,
    params: Params,
    codes: Codes,
    keys: Array,
    mesh: Mesh | None = None,
) -> UInt8[Array, "B H W C"]:
    """Images of codes, large ones in strips.

    Args:
      tokenizer, params: its decoder, replicated.
      codes: in {-1, 1}, or continuous latents.
      keys: [B], for the noise of a GAN decoder.
      mesh: each device decodes some rows of the images, or all rows where their number is not
        divisible by the number of devices; None for one device.
    """
    noise = None
    if tokenizer.config.decoder == "gan":
        noise = jax.vmap(lambda key: jax.random.normal(key, codes.shape[1:]))(keys)
    split = (
        mesh is not None
        and mesh.size > 1
        and codes.shape[1] % mesh.size == 0
        and not tokenizer.config.has_attention
    )
    axes = AXES if split else ()

    def decode(params: Params, codes: Array, noise: Array | None) -> Array:
        if tokenizer.config.has_attention:  # every position is needed at once
            values: Any = tokenizer.apply(
                {"params": params}, codes.astype(jnp.float32), noise, method="decode"
            )
            return image_files.to_uint8(values)
        values = strips.decode(tokenizer, params, codes.astype(jnp.float32), noise, axes=axes)
        return image_files.to_uint8(values)

    if mesh is None:
        return decode(params, codes, noise)
    # By shard_map: the partitioner would gather a sharded image to take a strip of it.
    spec = P(None, axes or None)
    return jax.shard_map(
        decode, mesh=mesh, in_specs=(P(), spec, spec), out_specs=spec, check_vma=False
    )(params, codes, noise)


def decode_on_mesh(
    tokenizer: Autoencoder,
    params: Params,
    codes: Codes,
    keys: UInt32[Array, "B 2"],
    mesh: Mesh,
) -> UInt8[Array, "B H W C"]:
    """`decode_codes` of any number of images, a chunk at a time, from the data of their keys.

    Devices of a data mesh that divides the batch decode their own images; other devices some rows
    of each image.
    """

    def in_chunks(mesh: Mesh | None, params: Params, codes: Array, keys: Array) -> Array:
        def decode(codes: Array, keys: Array) -> Array:
            return decode_codes(tokenizer, params, codes, jax.random.wrap_key_data(keys), mesh)

        count, height, width, _ = codes.shape
        down = tokenizer.config.downsampling
        chunk = chunk_size(height * down, width * down)
        if count <= chunk:
            return decode(codes, keys)
        rows = np.arange(-(-count // chunk) * chunk).clip(max=count - 1).reshape(-1, chunk)
        images = jax.lax.map(lambda part: decode(*part), (codes[rows], keys[rows]))
        return images.reshape(-1, *images.shape[2:])[:count]

    if not splits_images(mesh, len(codes)):
        return in_chunks(mesh, params, codes, keys)
    rows = P(BATCH)
    return jax.shard_map(
        functools.partial(in_chunks, None),
        mesh=mesh,
        in_specs=(P(), rows, rows),
        out_specs=rows,
        check_vma=False,
    )(params, codes, keys)


def chunk_size(height: int, width: int) -> int:
    """Images of height x width pixels that the tokenizer handles at a time."""
    return max(1, CHUNK_PIXELS // (height * width))
