"""Models ready to use: images to bits and back, labels to images. Loaded from a model folder; numpy in, numpy out."""

import difflib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8, UInt8

from bitdance_jax.config import (
    ClassConditionalConfig,
    ConfigError,
    SamplerConfig,
    TokenizerConfig,
    from_dict,
)
from bitdance_jax.config.plain import Count, checked
from bitdance_jax.distributed.mesh import AXES
from bitdance_jax.errors import UserError, short
from bitdance_jax.io import image_files, model_folder, model_lookup, paths, readers
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.io.progress import Progress
from bitdance_jax.models.class_conditional import (
    ClassConditional,
    PatchReader,
    abstract_params,
    values_to_codes,
    with_unconditional,
)
from bitdance_jax.nn.stack import unstack
from bitdance_jax.perf import hardware
from bitdance_jax.pipelines import arguments
from bitdance_jax.pipelines.partial import Partial, fill_in, grey_out
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.compiled import CompiledSampler
from bitdance_jax.sampling.next_patch import Scales, noise_of_images
from bitdance_jax.sampling.solvers import Solver
from bitdance_jax.tokenizer import autoencoder, lfq, strips
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.transformer import order


CHUNK_PIXELS = 2**20
"""Pixels that the tokenizer handles at a time: four 512 x 512 images, 256 of 64 x 64. Keeps memory flat for any number of images."""


class Tokenizer:
    """Images to bits and back.

    Attributes:
      config: sizes.
      params: weights.
    """

    def __init__(
        self, config: TokenizerConfig, params: Any, dtype: DTypeLike = jnp.float32
    ) -> None:
        self.config, dtype = config, arguments.compute_type(dtype)
        self.params = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
        model = Autoencoder(config, dtype)

        def encode(params: Any, images: UInt8[Array, "B H W C"]) -> Int8[Array, "B h w K"]:
            z: Any = model.apply({"params": params}, image_files.to_model(images), method="encode")
            return lfq.quantize(z).astype(jnp.int8)

        self._encode, self._decode = (
            jax.jit(encode),
            jax.jit(functools.partial(decode_codes, model)),
        )

    def encode(self, images: UInt8[np.ndarray, "B H W C"]) -> Int8[np.ndarray, "B h w K"]:
        """Codes in {-1, 1} of images whose sides are divisible by `config.downsampling`.

        Raises:
          UserError: images of another type or shape.
        """
        images = arguments.images(images, self.config)
        if not len(images):
            return np.zeros(
                (
                    0,
                    *(side // self.config.downsampling for side in images.shape[1:3]),
                    self.config.bits,
                ),
                np.int8,
            )
        chunk = chunk_size(*images.shape[1:3])
        return np.concatenate(
            [self._encode(self.params, part)[:count] for part, count in chunks(images, chunk)]
        )

    def decode(
        self, codes: Int8[np.ndarray, "B h w K"], seed: int = 0, first_index: int = 0
    ) -> UInt8[np.ndarray, "B H W C"]:
        """Images of codes. A GAN decoder's noise depends on the seed and on an image's number, `first_index` and up, alone.

        Raises:
          UserError: codes of another shape or with other values, a seed or number out of range.
        """
        codes = arguments.codes(codes, self.config)
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


class ClassConditionalPipeline:
    """Labels to images.

    Attributes:
      config: sizes.
      tokenizer: its tokenizer.
      class_names: name of each label; numbers where none were saved.
      sampler: how it samples unless told otherwise.
      dtype: compute type.
    """

    def __init__(
        self,
        config: ClassConditionalConfig,
        params: Any,
        tokenizer: Tokenizer,
        class_names: Sequence[str] | None = None,
        sampler: SamplerConfig = SamplerConfig(),
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        """`params`: of `ClassConditional`, stacked; they are unstacked here, once (`transformer.stack`)."""
        self.config, self.tokenizer, self.sampler = config, tokenizer, sampler
        self.class_names = checked(
            tuple[str, ...],
            class_names or [str(i) for i in range(config.num_classes)],
            "class_names",
        )
        if len(self.class_names) != config.num_classes:
            raise UserError(
                f"{config.num_classes} classes need as many class_names, got {len(self.class_names)}"
            )
        self.dtype = arguments.compute_type(dtype)
        self.set_params(params)
        model = ClassConditional(config, dtype=self.dtype)
        self._sample = jax.jit(functools.partial(sample_labels, model), static_argnames="solver")
        self._by_steps = CompiledSampler(functools.partial(read_labels, model))

    def set_params(self, params: Any) -> None:
        """Other weights of the same model, stacked; nothing compiles anew."""
        self._params = sampling_params(params, self.dtype)

    @property
    def params(self) -> dict[str, Any]:
        """All weights, as `draw` takes them."""
        return {"model": self._params, "tokenizer": self.tokenizer.params}

    def draw(
        self, params: Any, labels: Int[Array, "B"], keys: Array, scales: Scales, *, solver: Solver
    ) -> UInt8[Array, "B H W 3"]:
        """`sample` as a pure function of arrays, for callers that place weights and batch themselves.

        Args:
          params: as in `self.params`.
          labels: numbers.
          keys: `image_keys`.
          scales, solver: `resolve` of a sampler.
        """
        sample = functools.partial(self._sample, solver=solver)
        return draw_images(sample, self.config, self.dtype, params, labels, keys, scales)

    def resolve(self, sampler: SamplerConfig) -> tuple[Solver, Float[np.ndarray, "N E"] | None]:
        """The solver, for which programs are compiled, and the guidance scales, with which they are called."""
        return next_patch.resolve(sampler, self.config.head.time_shift, self.config.num_steps)

    def sample(
        self,
        labels: Sequence[int | str],
        seed: int = 0,
        *,
        sampler: SamplerConfig | None = None,
        batch_size: int = 32,
        first_index: int = 0,
        progress: bool = True,
    ) -> UInt8[np.ndarray, "B H W 3"]:
        """One image for each label.

        Args:
          labels: numbers 0 ... num_classes - 1, or class names.
          seed: image i of a seed and label is the same whatever the batch size and its neighbours.
          sampler: solver and guidance, instead of the model's own.
          batch_size: images drawn at a time; each size compiles once, and each solver.
          first_index: number of the first image, to go on with a seed's images.
          progress: show a bar.

        Raises:
          UserError: a label that the model does not have, or an argument of another type or range.
        """
        codes = self.sample_codes(
            labels,
            seed,
            sampler=sampler,
            batch_size=batch_size,
            first_index=first_index,
            progress=progress,
        )
        return self.tokenizer.decode(codes, seed, first_index)

    def sample_codes(
        self,
        labels: Sequence[int | str],
        seed: int = 0,
        *,
        sampler: SamplerConfig | None = None,
        batch_size: int = 32,
        first_index: int = 0,
        progress: bool = True,
    ) -> Int8[np.ndarray, "B h w K"]:
        """`sample` without the decoding: codes in {-1, 1}."""
        batch_size, sampler = checked(Count, batch_size, "batch_size"), self._sampler(sampler)
        numbers, (solver, scales) = self._numbers(labels), self.resolve(sampler)
        keys = image_keys(seed, first_index, len(numbers))
        parts = [
            np.zeros((0, self.config.grid, self.config.grid, self.config.tokenizer.bits), np.int8)
        ]
        with Progress(len(numbers), "image", "sampling", shown=progress) as bar:
            for (part, count), (part_keys, _) in zip(
                chunks(numbers, batch_size), chunks(keys, batch_size), strict=True
            ):
                codes = self._sample(self._params, part, part_keys, scales, solver=solver)
                parts.append(np.asarray(codes)[:count])
                bar.advance(count)
        return np.concatenate(parts)

    def sample_steps(
        self,
        labels: Sequence[int | str],
        seed: int = 0,
        *,
        every: int,
        sampler: SamplerConfig | None = None,
        first_index: int = 0,
    ) -> Iterator[Partial]:
        """`sample` of one batch, seen while it is drawn: what there is after the first patch, after every `every` more, and at the end.

        The last images are those that `sample` gives, up to rounding.

        Raises:
          UserError: as `sample`; `every` is not positive; no labels.
        """
        every, sampler = checked(Count, every, "every"), self._sampler(sampler)
        config, numbers = self.config, self._numbers(labels)
        if not len(numbers):
            raise UserError("there are no labels to draw")
        keys = np.asarray(jax.random.key_data(image_keys(seed, first_index, len(numbers))))
        solver, scales = self.resolve(sampler)
        options: Any = {
            "solver": solver,
            "scales": scales,
            "num_patches": config.num_steps,
            "every": every,
        }
        positions = order.token_positions(config.grid, config.grid, config.patch_side, config.order)
        for state, drawn in self._by_steps.states(self._params, numbers, keys, **options):
            sequences = fill_in(np.asarray(state.values), drawn)
            codes = order.sequence_to_grid(
                jnp.asarray(sequences, jnp.float32), config.grid, config.patch_side, config.order
            )
            images = self.tokenizer.decode(np.asarray(codes, np.int8), seed, first_index)
            missing = positions[drawn * config.tokens_per_step :]
            yield Partial(
                drawn, config.num_steps, grey_out(images, missing, config.tokenizer.downsampling)
            )

    def label(self, label: int | str) -> int:
        """The number of a label given as a number or a name."""
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        try:
            number = int(label) if isinstance(label, str) else checked(int, label, "a label")
        except ConfigError:
            raise
        except ValueError:
            near = difflib.get_close_matches(str(label), self.class_names, n=1, cutoff=0.4)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"the model has: {', '.join(self.class_names[:20])}"
            )
            raise UserError(f"unknown label {short(label)}; {hint}") from None
        if not 0 <= number < self.config.num_classes:
            raise UserError(
                f"label {short(number)} is out of range; the model has labels 0 to {self.config.num_classes - 1}"
            )
        return number

    def _numbers(self, labels: Sequence[int | str]) -> Int[np.ndarray, "B"]:
        return np.array(
            [self.label(label) for label in arguments.items(labels, "labels", "[0, 'Flags']")],
            np.int32,
        )

    def _sampler(self, sampler: SamplerConfig | None) -> SamplerConfig:
        return self.sampler if sampler is None else checked(SamplerConfig, sampler, "sampler")


def load(
    folder: str | os.PathLike[str] = EMBEDDED, dtype: DTypeLike = jnp.float32
) -> Tokenizer | ClassConditionalPipeline:
    """The tokenizer or class-conditional model of a model folder, local or gs://, or the embedded one, "emoji".

    Args:
      folder: a model folder, or the folder of a training run (`bitdance_jax.io.model_lookup`).
      dtype: compute type; the weights are kept in it too ("bfloat16" halves their memory).

    Raises:
      UserError: no such folder, damaged, or not such a model.
    """
    folder = paths.expand(checked(str, folder, "folder"))
    dtype = arguments.compute_type(dtype)
    described = model_lookup.read_config(folder)
    if described.kind == "text_to_image":
        raise UserError(
            f"{os.fspath(folder)} holds a text_to_image model, and a tokenizer or class_conditional model is needed here"
        )
    where = f"{os.fspath(folder)}/config.json"
    if described.kind == "tokenizer":
        tokenizer_config = from_dict(TokenizerConfig, described.config, f"{where}: config")
        return Tokenizer(
            tokenizer_config,
            _weights(folder, autoencoder.abstract_params(tokenizer_config), dtype),
            dtype,
        )
    config = from_dict(ClassConditionalConfig, described.config, f"{where}: config")
    sampler = from_dict(
        SamplerConfig, described.metadata.get("sampler", {}), f"{where}: metadata.sampler"
    )
    names = readers.validate(
        described.metadata.get("class_names"),
        list[str] | None,
        where=f"{where}: metadata.class_names",
    )
    abstract = {
        "model": abstract_params(config),
        "tokenizer": autoencoder.abstract_params(config.tokenizer),
    }
    params = _weights(folder, abstract, dtype)
    tokenizer = Tokenizer(config.tokenizer, params["tokenizer"], dtype)
    return ClassConditionalPipeline(config, params["model"], tokenizer, names, sampler, dtype)


def _weights(folder: str | os.PathLike[str], abstract: Any, dtype: DTypeLike) -> Any:
    """Those of a model folder, or of a run, if they are like `abstract` and this machine can hold them in `dtype`."""
    kept = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), abstract)
    hardware.check_fits(kept, f"the model in {os.fspath(folder)}")
    params = model_lookup.load(folder).params
    model_folder.check_shapes(folder, params, abstract)
    return params


def sample_labels(
    model: ClassConditional,
    params: Any,
    labels: Int[Array, "B"],
    keys: Array,
    scales: Scales,
    *,
    solver: Solver,
) -> Int8[Array, "B h w K"]:
    """Codes in {-1, 1} of one image for each label; see `next_patch.resolve` for `scales` and `solver`."""
    reader = read_labels(model, params, labels, scales)
    noise = noise_of_images(reader, keys, solver)
    values = next_patch.sample(reader, noise=noise, solver=solver, scales=scales)
    return values_to_codes(values, model.config).astype(jnp.int8)


def read_labels(
    model: ClassConditional, params: Any, labels: Int[Array, "B"], scales: Scales
) -> PatchReader:
    """The model after labels, with unconditional rows where there are guidance scales."""
    return PatchReader(
        model, params, labels if scales is None else with_unconditional(labels, model.config)
    )


def decode_codes(
    tokenizer: Autoencoder,
    params: Any,
    codes: Int8[Array, "B h w K"],
    keys: Array,
    mesh: Mesh | None = None,
) -> UInt8[Array, "B H W C"]:
    """Images of codes, large ones in strips.

    Args:
      tokenizer, params: its decoder, whole on every device.
      codes: in {-1, 1}.
      keys: [B], for the noise of a GAN decoder.
      mesh: each device decodes some rows of the images, or all where it does not divide them; one device if left out.
    """
    noise = (
        jax.vmap(lambda key: jax.random.normal(key, codes.shape[1:]))(keys)
        if tokenizer.config.decoder == "gan"
        else None
    )
    axes = AXES if mesh is not None and mesh.size > 1 and codes.shape[1] % mesh.size == 0 else ()

    def decode(params: Any, codes: Array, noise: Array | None) -> Array:
        values = strips.decode(tokenizer, params, codes.astype(jnp.float32), noise, axes=axes)
        return image_files.to_uint8(values)

    if mesh is None:
        return decode(params, codes, noise)
    # Not left to the partitioner, which would gather an image that is cut over devices to take a strip of it.
    cut = P(None, axes or None)
    return jax.shard_map(
        decode, mesh=mesh, in_specs=(P(), cut, cut), out_specs=cut, check_vma=False
    )(params, codes, noise)


def draw_images(
    sample: Callable[[Any, Array, Array, Scales], Array],
    config: ClassConditionalConfig,
    dtype: DTypeLike,
    params: Any,
    labels: Array,
    keys: Array,
    scales: Scales,
) -> UInt8[Array, "B H W 3"]:
    """One image for each label.

    Args:
      sample: (weights, labels, keys, scales) to codes, for example `sample_labels` of a model and a solver.
      config, dtype: sizes and compute type.
      params: {"model": `sampling_params`, "tokenizer": its weights}.
      labels, keys: int [B], and `image_keys`.
      scales: of guidance.
    """
    codes = sample(params["model"], labels, keys, scales)

    def decode(image: tuple[Array, Array]) -> Array:
        code, key = image
        return decode_codes(
            Autoencoder(config.tokenizer, dtype), params["tokenizer"], code[None], key[None]
        )[0]

    return jax.lax.map(
        decode, (codes, keys), batch_size=chunk_size(config.image_size, config.image_size)
    )


def sampling_params(params: Any, dtype: DTypeLike) -> Any:
    """Stacked parameters of a model as it samples: unstacked, and as `weight_dtype` says."""

    def convert(path: tuple[Any, ...], array: Any) -> Array:
        return jnp.asarray(array, weight_dtype([part.key for part in path], dtype))

    return jax.tree_util.tree_map_with_path(convert, unstack(params))


def weight_dtype(path: Sequence[str], dtype: DTypeLike) -> jnp.dtype:
    """The type in which sampling keeps the weight at a path: the compute type.

    Those of norms stay float32, in which norms compute: else each would be converted anew at every step of the head. So do
    the class-conditional models' embeddings, which enter the residual stream without a product.
    """
    embeddings = ("class_embedding", "query_tokens", "position_embedding")
    wide = any("norm" in name or name in embeddings for name in path)
    return jnp.dtype(jnp.float32 if wide else dtype)


def check_seed(seed: int) -> None:
    """Raises a UserError for a seed that is not a number of 32 bits."""
    arguments.seed(seed)


def image_keys(seed: int, first_index: int, count: int) -> Array:
    """Keys [count] of the images `first_index` and up: each depends on the seed and its number alone.

    Raises:
      UserError: a seed or an image's number that does not have 32 bits.
    """
    seed, first = arguments.seed(seed), arguments.first_index(first_index, count)
    return _fold_in_each(jax.random.key(seed), np.arange(first, first + count).astype(np.uint32))


_fold_in_each = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def chunk_size(height: int, width: int) -> int:
    """How many images the tokenizer takes at a time, to bound memory."""
    return max(1, CHUNK_PIXELS // (height * width))


def chunks(array: Any, size: int) -> Iterator[tuple[Any, int]]:
    """Pieces of `size` rows and how many of them count; a short last one is filled up by its last row, to keep one compiled shape."""
    size = min(size, max(len(array), 1))
    for start in range(0, len(array), size):
        piece = array[start : start + size]
        missing = size - len(piece)
        yield (
            (
                piece
                if not missing
                else jnp.concatenate([piece, jnp.repeat(piece[-1:], missing, axis=0)])
            ),
            len(piece),
        )
