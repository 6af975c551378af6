"""Text-to-image models ready to use: prompts to images, with weights of a folder or in memory."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from etils import epath
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Int, UInt8

from bitdance_jax.config import (
    MeshConfig,
    SamplerConfig,
    TextSamplerConfig,
    TextToImageConfig,
    from_dict,
)
from bitdance_jax.config.plain import PathName, checked
from bitdance_jax.convert import peft
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io import model_folder, model_lookup
from bitdance_jax.io.model_folder import ModelFolder
from bitdance_jax.io.model_lookup import UnfinishedRun
from bitdance_jax.io.orbax_weights import StoredArray
from bitdance_jax.models import text_to_image as model
from bitdance_jax.models.prompt_rows import Prompt, ShownImage, pad_prompts, prefix_rows
from bitdance_jax.models.text_to_image import MAX_PROMPT, Prefixes
from bitdance_jax.nn import lora
from bitdance_jax.nn.stack import unstack
from bitdance_jax.pipelines import checks, given_images, image_prompts, memory
from bitdance_jax.pipelines.answers import LM_HEAD, AnswerProgram
from bitdance_jax.pipelines.batching import ImageKeys, Seeds
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.pipelines.image_prompts import ImageLike, ImagePrompt
from bitdance_jax.pipelines.pipeline import Pipeline
from bitdance_jax.pipelines.request import Size
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.pipelines.weighted import Conditions
from bitdance_jax.pipelines.weights import Params, WeightType, stored_as
from bitdance_jax.text import prompt_tokenizer
from bitdance_jax.text.prompt_tokenizer import DEFAULT_QUESTION, PromptTokenizer
from bitdance_jax.tokenizer import autoencoder


RELEASED_SAMPLER = SamplerConfig(head_steps=50, guidance_scale=7.5, guidance_schedule="constant")
"""How the released models sample, where a model folder does not say."""

ALL_DEVICES = MeshConfig(data=1, tensor=-1)
"""Every layer sharded over all devices: the least time for an image, the least memory a device."""


class TextToImage(Pipeline):
    """Prompts to images; see `Pipeline`. `generate` is another name of `sample`.

    Attributes:
      prompts: turns prompts into token ids.
    """

    kind = "text_to_image"
    input_kind = "prompt"
    config: TextToImageConfig
    default_size = (1024, 1024)
    default_batch_size = 4

    def __init__(
        self,
        config: TextToImageConfig,
        params: Params | None,
        tokenizer: Tokenizer,
        prompts: PromptTokenizer,
        sampler: SamplerConfig = RELEASED_SAMPLER,
        dtype: DTypeLike | None = None,
        *,
        mesh: MeshConfig | None = None,
        weights: WeightType | None = None,
        name: str = "",
    ) -> None:
        """
        Args:
          config: sizes.
          params: of `models.text_to_image.TextToImage`, stacked, with or without `text/lm_head`;
            None: until `set_params`.
          tokenizer: its image tokenizer.
          prompts: its prompt tokenizer.
          sampler: solver and guidance where a call does not give its own.
          dtype: compute type; None: bfloat16, float32 on CPUs.
          mesh: how the devices share the work; None: `ALL_DEVICES`.
          weights: the type that weights are stored in; None: the compute type.
          name: of the model, for the text in saved images.

        Raises:
          UserError: a prompt tokenizer of another model, or a mesh that does not fit the devices.
        """
        self.config = config
        self.prompts = prompts
        self._folder: str | None = None
        self._encoder: dict[tuple[str, ...], StoredArray] = {}
        self._adapters: peft.Adapters | None = None
        self._lm_head: Any = None
        self._answer: AnswerProgram | None = None
        if prompts.image_tokens != config.image_tokens:
            raise UserError(
                "the prompt tokenizer's files are not the model's: "
                "their image tokens differ from its config"
            )
        compute = _compute_type(dtype)
        super().__init__(
            params,
            tokenizer,
            sampler=sampler,
            dtype=compute,
            mesh=make_mesh(checked(MeshConfig | None, mesh, "mesh") or ALL_DEVICES),
            weights=checked(WeightType, compute.name if weights is None else weights, "weights"),
            name=name,
        )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeLike | None = None,
        mesh: MeshConfig | None = None,
        weights: WeightType | None = None,
        lora: str | os.PathLike[str] | None = None,
        lazy: bool = False,
    ) -> "TextToImage":
        """The model of a folder, its weights read from the disk straight to the devices.

        Args:
          folder: a model folder, local or gs://, a training run, or a Hugging Face id, as
            `bitdance_jax.load`.
          dtype, mesh, weights: see `__init__`.
          lora: folder of an adapter of the model, in PEFT's files; it is merged into the weights.
          lazy: read the weights when they are first needed; `sample` refuses bad input before.

        Raises:
          UserError: no such folder, damaged, another kind of model, no tokenizer files or others,
            or an adapter of another model.
        """
        named = local_folder(folder)
        found = model_lookup.locate(named)
        if isinstance(found, UnfinishedRun):
            return cls._of_run(found, named, lora, dtype=dtype, mesh=mesh, weights=weights)
        folder = os.fspath(found)
        described = model_folder.read_config(folder, expect=cls.kind)
        where = f"{folder}/config.json"
        config = from_dict(TextToImageConfig, described.config, f"{where}: config")
        loaded = cls(
            config,
            None,
            Tokenizer(config.tokenizer, lambda: loaded._read_tokenizer(), _compute_type(dtype)),
            PromptTokenizer(epath.Path(folder) / prompt_tokenizer.FOLDER, config.tokens_per_step),
            _recorded_sampler(described, where),
            dtype,
            mesh=mesh,
            weights=weights,
            name=checks.model_name(named),
        )
        loaded._set_default_size(described, where)
        loaded._folder = folder
        if lora is not None:
            loaded._adapters = _read_adapters(lora, config, folder)
        if not lazy:
            _ = loaded.params
        return loaded

    @classmethod
    def _of_run(
        cls,
        run: UnfinishedRun,
        name: str,
        adapter: str | os.PathLike[str] | None,
        *,
        dtype: DTypeLike | None,
        **options: Any,
    ) -> "TextToImage":
        """The model of a run that has not finished, with the weights of its newest checkpoint."""
        saved = run.load()
        where = f"{run.folder / model_lookup.RECORD}: config"
        config = from_dict(TextToImageConfig, saved.config, where)
        loaded = cls(
            config,
            None,
            Tokenizer(config.tokenizer, saved.params["tokenizer"], _compute_type(dtype)),
            PromptTokenizer(run.folder / prompt_tokenizer.FOLDER, config.tokens_per_step),
            _recorded_sampler(saved, where),
            dtype,
            name=checks.model_name(name),
            **options,
        )
        loaded._set_default_size(saved, where)
        params = saved.params["model"]
        if adapter is not None:
            adapters = _read_adapters(adapter, config, os.fspath(run.folder))
            params = lora.attached(params, adapters.params, adapters.config.scale)
        loaded.set_params(params)
        return loaded

    def _set_default_size(self, described: ModelFolder, where: str) -> None:
        """Sets the size that the folder names, or leaves the released models'."""
        if size := described.metadata.get("size"):
            self.default_size = self._checked_size(checked(str, size, f"{where}: metadata.size"))

    generate = Pipeline.sample

    def fit(self, image: ImageLike) -> UInt8[np.ndarray, "h w 3"]:
        """An image as a prompt shows it: scaled and cropped around its centre to a size that the
        model is trained with, of about the area of `default_size`.

        Args:
          image: a file, a PIL image or uint8 [H, W, 3].

        Raises:
          UserError: no image, or damaged.
        """
        resolution = math.isqrt(self.default_size[0] * self.default_size[1])
        return image_prompts.fit(image, self.config, resolution)

    def show(self, image: ImageLike) -> ShownImage:
        """A fitted image as the model reads it, encoded once for several prompts and calls.

        Raises:
          UserError: as `fit`.
        """
        return image_prompts.encode(self.fit(image), self.tokenizer, self.config.patch_side)

    def edit(
        self, image: ImageLike, prompt: str, seed: Seeds = 0, **options: Any
    ) -> np.ndarray | list[PIL.Image.Image]:
        """`sample` of a prompt that shows an image: images of the fitted image's size.

        Args:
          image: a file, a PIL image or uint8 [H, W, 3]; see `ImagePrompt`.
          prompt: what to sample, such as "make it night".
          seed: see `sample`.
          options: the other arguments of `sample`.

        Raises:
          UserError: as `sample`, or an image that cannot be read.
        """
        fitted = self.fit(image)
        options = {"size": fitted.shape[:2], **options}
        return self.sample(ImagePrompt(prompt, [fitted]), seed, **options)

    def describe(
        self,
        image: ImageLike,
        question: str = DEFAULT_QUESTION,
        seed: int = 0,
        *,
        sampler: TextSamplerConfig | None = None,
    ) -> str:
        """The model's answer, in text, to a question about an image.

        Args:
          image: a file, a PIL image or uint8 [H, W, 3]; see `ImagePrompt`.
          question: a prompt.
          seed: of the answer, of 32 bits.
          sampler: length, temperature, top-k and top-p; None: as released.

        Raises:
          UserError: a bad argument, or a model without the weights of its output layer.
        """
        sampler = checked(TextSamplerConfig | None, sampler, "sampler") or TextSamplerConfig()
        text = self.prompts.encode(checked(str, question, "question"), MAX_PROMPT)
        prefixes = pad_prompts(self.config, [[*self._shown([image]), *text]], [])
        keys = ImageKeys.checked(seed, 0, 1).data(np.arange(1))
        if self._answer is None:
            self._answer = AnswerProgram(self.config, self.mesh, self.dtype)
        tokens, lengths = self._answer(
            self.params["model"],
            self._output_layer(self._answer),
            prefixes,
            keys,
            end=self.prompts.end_of_image()[1],
            config=sampler,
        )
        return self.prompts.decode(np.asarray(tokens)[0, : int(lengths[0])].tolist())

    def set_params(self, params: Params | None) -> None:
        self._lm_head = None if params is None else traverse_util.flatten_dict(params).get(LM_HEAD)
        super().set_params(params)

    def _output_layer(self, answer: AnswerProgram) -> Array:
        if self._lm_head is None:
            raise ConfigError(
                "the weights have no text/lm_head, which answers in text need", "params"
            )
        if not isinstance(self._lm_head, Array):
            self._lm_head = answer.place(self._lm_head)
        return self._lm_head

    def _checked_size(self, size: Size | None) -> tuple[int, int]:
        height, width = self.default_size if size is None else checks.parse_size(size)
        model.check_size(self.config, height, width)
        return height, width

    def _canvas_size(self, image: np.ndarray) -> Size:
        return given_images.size_in_pixels(image, self.config.tokenizer)

    def _checked_inputs(
        self, asked: Conditions, size: tuple[int, int], negative: tuple[str, ...] | None
    ) -> tuple[tuple[Prefixes, Prefixes], Int[np.ndarray, "T 2"], Callable[[int], str]]:
        several = checks.items(asked.inputs, "prompts")
        texts = [one.text if isinstance(one, ImagePrompt) else one for one in several]
        prompts = checked(tuple[str, ...], texts, "prompt")
        ids = [self.prompts.encode(text, MAX_PROMPT) for text in prompts]
        images = [
            self._shown(one.images) if isinstance(one, ImagePrompt) else [] for one in several
        ]
        conditional: list[Prompt] = [
            [*shown, *text] for shown, text in zip(images, ids, strict=True)
        ]
        shown_first = images[:: asked.each]
        texts_of_images = self._unconditional(negative, len(shown_first))
        unconditional: list[Prompt] = [
            [*shown, *text] for shown, text in zip(shown_first, texts_of_images, strict=True)
        ]
        all_rows: list[Prompt] = [*conditional, *unconditional] or [self.prompts.unconditional()]
        rows = prefix_rows(self.config, all_rows, *size)
        count = len(prompts)
        first = jax.tree.map(lambda x: x[:count], rows)
        if asked.weights is not None:
            first = jax.tree.map(lambda x: x.reshape(-1, asked.each, *x.shape[1:]), first)
        second = jax.tree.map(lambda x: x[count : count + len(unconditional)], rows)
        return (first, second), self._token_positions(size), prompts.__getitem__

    def _unconditional(self, negative: tuple[str, ...] | None, count: int) -> list[list[int]]:
        """The tokens that guidance leads away from, of each of `count` images."""
        if negative is None:
            return [self.prompts.unconditional()] * count
        if len(negative) not in (1, count):
            raise ConfigError(
                f"give one negative_prompt for all images or one for each prompt: {count} prompts, "
                f"got {len(negative)}",
                "negative_prompt",
            )
        ids = [self.prompts.encode(text, MAX_PROMPT) for text in negative]
        return ids * count if len(ids) == 1 else ids

    def _shown(self, images: Sequence[ImageLike | ShownImage]) -> list[int | ShownImage]:
        """Images as they stand in a prompt."""
        end = self.prompts.end_of_image()[0]
        parts: list[int | ShownImage] = []
        for image in images:
            parts += [image if isinstance(image, ShownImage) else self.show(image), end]
        return parts

    def _token_positions(self, size: tuple[int, int]) -> Int[np.ndarray, "T 2"]:
        return model.token_positions(self.config, *size)

    def _check_memory(self, size: tuple[int, int], images: int, sampler: SamplerConfig) -> None:
        device = self.mesh.devices.flat[0]
        if self._params is not None and device.platform == "cpu":
            return  # Weights that are loaded are not part of a CPU's available memory.
        setting = memory.Setting(
            self.config,
            self._weights,
            self.dtype.name,
            self.mesh.devices.shape,
            size,
            images,
            sampler,
        )
        memory.check(setting, device)

    def _read_params(self) -> Params:
        if self._folder is None:
            return super()._read_params()
        abstract = {
            "model": model.abstract_params(self.config),
            "tokenizer": autoencoder.abstract_params(self.config.tokenizer),
        }
        self._check_memory((0, 0), 0, self.sampler)
        adapters: dict[tuple[str, ...], Any] = {}
        if self._adapters is not None:
            adapters = traverse_util.flatten_dict({"model": unstack(self._adapters.params)})
        options: Any = {
            "abstract": abstract,
            "read_array": functools.partial(self._place, adapters),
            "unrolled": True,
        }
        return model_folder.load(self._folder, **options).params

    def _place(
        self, adapters: dict[tuple[str, ...], Any], path: tuple[str, ...], stored: StoredArray
    ) -> Any:
        if path[1:] == LM_HEAD:
            self._lm_head = stored
        if path[:2] == ("tokenizer", "encoder"):
            self._encoder[path[1:]] = stored
        how = stored_as(self.mesh, path, stored.shape, self.dtype, self._weights)
        if how is None:
            return None
        array = jax.make_array_from_callback(
            stored.shape, how.sharding, lambda index: stored[index].astype(how.dtype)
        )
        a, b = (adapters.get((*path[:-1], name)) for name in (lora.A, lora.B))
        if self._adapters is not None and path[-1] == "kernel" and a is not None:
            merge = jax.jit(lora.merged, out_shardings=how.sharding, donate_argnums=0)
            array = merge(array, a, b, self._adapters.config.scale)
        return how.store(path, array)

    def _read_tokenizer(self) -> Params:
        """The decoder, and the encoder, which sampling does not read."""
        decoder = self.params["tokenizer"]["decoder"]
        encoder = {path: stored[...] for path, stored in self._encoder.items()}
        return {"decoder": decoder, **traverse_util.unflatten_dict(encoder)}


def _read_adapters(
    folder: str | os.PathLike[str], config: TextToImageConfig, model: str
) -> peft.Adapters:
    name = checked(PathName, folder, "lora")
    adapters = peft.load(name, config)
    peft.report_other_base(adapters, name, model)
    return adapters


def _recorded_sampler(described: ModelFolder, where: str) -> SamplerConfig:
    recorded = described.metadata.get("sampler")
    if not recorded:
        return RELEASED_SAMPLER
    return from_dict(SamplerConfig, recorded, f"{where}: metadata.sampler")


def _compute_type(dtype: DTypeLike | None) -> jnp.dtype:
    if dtype is None:
        dtype = jnp.float32 if jax.devices()[0].platform == "cpu" else jnp.bfloat16
    return checks.compute_type(dtype)
