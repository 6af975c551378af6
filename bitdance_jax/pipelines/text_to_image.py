"""Text-to-image models ready to use: prompts to images, with weights of a folder or in memory."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Int

from bitdance_jax.config import MeshConfig, SamplerConfig, TextToImageConfig, from_dict
from bitdance_jax.config.plain import PathName, checked
from bitdance_jax.convert import peft
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder, model_lookup
from bitdance_jax.io.model_folder import ModelFolder
from bitdance_jax.io.model_lookup import UnfinishedRun
from bitdance_jax.io.orbax_weights import StoredArray
from bitdance_jax.models import text_to_image as model
from bitdance_jax.models.text_to_image import MAX_PROMPT, Prefixes
from bitdance_jax.nn import lora, quantize
from bitdance_jax.nn.stack import unstack
from bitdance_jax.pipelines import checks, memory
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.pipelines.pipeline import Pipeline
from bitdance_jax.pipelines.request import LabelsOrPrompts, Size
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.pipelines.weights import Params, WeightType, stored_as
from bitdance_jax.text import prompt_tokenizer
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer
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
            return cls._of_run(found, named, dtype=dtype, mesh=mesh, weights=weights)
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
            loaded._adapters = peft.load(checked(PathName, lora, "lora"), config)
        if not lazy:
            _ = loaded.params
        return loaded

    @classmethod
    def _of_run(
        cls, run: UnfinishedRun, name: str, *, dtype: DTypeLike | None, **options: Any
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
        loaded.set_params(saved.params["model"])
        return loaded

    def _set_default_size(self, described: ModelFolder, where: str) -> None:
        """Sets the size that the folder names, or leaves the released models'."""
        if size := described.metadata.get("size"):
            self.default_size = self._checked_size(checked(str, size, f"{where}: metadata.size"))

    generate = Pipeline.sample

    def _checked_size(self, size: Size | None) -> tuple[int, int]:
        height, width = self.default_size if size is None else checks.parse_size(size)
        model.check_size(self.config, height, width)
        return height, width

    def _checked_inputs(
        self, inputs: LabelsOrPrompts, size: tuple[int, int]
    ) -> tuple[Prefixes, tuple[Prefixes, Int[np.ndarray, "T 2"]], Callable[[int], str]]:
        several = checks.items(inputs, "prompts")
        prompts = checked(tuple[str, ...], several, "prompt")
        ids = [self.prompts.encode(text, MAX_PROMPT) for text in prompts]
        rows = model.prefix_rows(self.config, [*ids, self.prompts.unconditional()], *size)
        tokens, padding = (np.asarray(array) for array in rows)
        shared = Prefixes(tokens[-1:], padding[-1:]), self._token_positions(size)
        return Prefixes(tokens[:-1], padding[:-1]), shared, prompts.__getitem__

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
        return quantize.quantize(array) if how.int8 else array

    def _read_tokenizer(self) -> Params:
        """The decoder, and the encoder, which sampling does not read."""
        decoder = self.params["tokenizer"]["decoder"]
        encoder = {path: stored[...] for path, stored in self._encoder.items()}
        return {"decoder": decoder, **traverse_util.unflatten_dict(encoder)}


def _recorded_sampler(described: ModelFolder, where: str) -> SamplerConfig:
    recorded = described.metadata.get("sampler")
    if not recorded:
        return RELEASED_SAMPLER
    return from_dict(SamplerConfig, recorded, f"{where}: metadata.sampler")


def _compute_type(dtype: DTypeLike | None) -> jnp.dtype:
    if dtype is None:
        dtype = jnp.float32 if jax.devices()[0].platform == "cpu" else jnp.bfloat16
    return checks.compute_type(dtype)
