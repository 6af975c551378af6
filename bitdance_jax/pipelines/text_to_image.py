"""Text-to-image models ready to use: prompts to images. Loaded from a model folder; numpy out."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from bitdance_jax.config import MeshConfig, SamplerConfig, TextToImageConfig, from_dict
from bitdance_jax.config.plain import Count, checked
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError, short
from bitdance_jax.io import model_folder, paths
from bitdance_jax.io.progress import Progress
from bitdance_jax.models import text_to_image as model
from bitdance_jax.models.text_to_image import MAX_PROMPT, Prefixes
from bitdance_jax.nn import quantize
from bitdance_jax.pipelines import arguments, memory
from bitdance_jax.pipelines.class_conditional import chunk_size, chunks, image_keys
from bitdance_jax.pipelines.partial import Partial, fill_in, grey_out
from bitdance_jax.pipelines.prompt_programs import Programs, kept
from bitdance_jax.sampling.guidance import rows_of_image
from bitdance_jax.sampling.next_patch import SamplerState, resolve
from bitdance_jax.text import prompt_tokenizer
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer
from bitdance_jax.tokenizer import autoencoder


RELEASED_SAMPLER = SamplerConfig(head_steps=50, guidance_scale=7.5, guidance_schedule="constant")
"""How the released models sample, where a model folder does not say."""

ALL_DEVICES = MeshConfig(data=1, tensor=-1)
"""Every layer cut over all devices: each image takes the least time, and each device the least memory."""

REPORTS = 16
"""How often `generate` returns to the host while it draws a batch, to show how far it is."""

Weights = Literal["float32", "bfloat16", "int8"]
"""How weights are kept; int8 (`bitdance_jax.nn.quantize`) all but 5 % of a released model's, the others in the compute type."""


class TextToImage:
    """Prompts to images.

    Attributes:
      config: sizes.
      sampler: how it samples unless told otherwise.
      mesh: the devices.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeLike | None = None,
        mesh: MeshConfig = ALL_DEVICES,
        weights: Weights | None = None,
    ) -> None:
        """Reads all but the weights, so that `generate` can refuse bad input at once; the first that it accepts has it read them.

        Args:
          folder: a text_to_image model folder, local or gs://.
          dtype: compute type; bfloat16 if left out, float32 on CPUs.
          mesh: how the devices share the work (`bitdance_jax.distributed.mesh`).
          weights: the type that the weights are kept in, the compute type if left out; "int8" as `bitdance_jax.nn.quantize` says.

        Raises:
          UserError: no such folder, another kind of model, no tokenizer files or others, a mesh that does not fit the devices.
        """
        self._folder = folder = paths.expand(checked(str, folder, "folder"))
        self._params: dict[str, Any] | None = None
        saved = model_folder.read_config(folder, expect="text_to_image")
        where = f"{os.fspath(folder)}/config.json"
        self.config = from_dict(TextToImageConfig, saved.config, f"{where}: config")
        recorded = saved.metadata.get("sampler")
        self.sampler = (
            from_dict(SamplerConfig, recorded, f"{where}: metadata.sampler")
            if recorded
            else RELEASED_SAMPLER
        )
        self._prompts = PromptTokenizer(
            epath.Path(folder) / prompt_tokenizer.FOLDER, self.config.tokens_per_step
        )
        if self._prompts.image_tokens != self.config.image_tokens:
            raise UserError(
                f"the tokenizer files in {os.fspath(folder)} are not the model's: their image tokens differ from config.json's"
            )
        self.mesh = make_mesh(checked(MeshConfig, mesh, "mesh"))
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self._dtype = arguments.compute_type(
            (jnp.float32 if on_cpu else jnp.bfloat16) if dtype is None else dtype
        )
        self._weights: str = checked(
            Weights, self._dtype.name if weights is None else weights, "weights"
        )
        self._programs = Programs(self.config, self.mesh, self._dtype)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeLike | None = None,
        mesh: MeshConfig = ALL_DEVICES,
        weights: Weights | None = None,
    ) -> "TextToImage":
        """The model with its weights, placed on the devices straight from the disk. See `__init__` for the arguments.

        Raises:
          UserError: also for damaged weights.
        """
        loaded = cls(folder, dtype=dtype, mesh=mesh, weights=weights)
        _ = loaded.params
        return loaded

    @property
    def params(self) -> dict[str, Any]:
        """The weights: {"model": unrolled, without `text/lm_head`; "tokenizer": the decoder alone}, read when first asked for."""
        if self._params is None:
            abstract = {
                "model": model.abstract_params(self.config),
                "tokenizer": autoencoder.abstract_params(self.config.tokenizer),
            }
            self._check_memory((0, 0), 0, self.sampler)
            self._params = model_folder.load(
                self._folder, abstract=abstract, read_array=self._place, unrolled=True
            ).params
        return self._params

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        size: str | tuple[int, int] = "1024x1024",
        images_per_prompt: int = 1,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        batch_size: int = 4,
        first_index: int = 0,
        progress: bool = True,
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Images of prompts: `images_per_prompt` of the first, then as many of the second, and so on.

        Args:
          prompt: one or several, of any lengths.
          size: "WIDTHxHEIGHT" in pixels, "2048x512" being a wide image, or (height, width) as in the shape of an array.
          images_per_prompt: images of each.
          seed: image i of a seed is the same whatever the batch size and its neighbours, up to rounding.
          sampler: solver and guidance, instead of the model's own.
          batch_size: images drawn at a time, on all devices together. Each size, batch size, solver and bucket of prompt lengths
            (`models.text_to_image.PREFIX_LENGTHS`) compiles once.
          first_index: number of the first image, to go on with a seed's images.
          progress: show a bar.

        Raises:
          UserError: an empty prompt or one that is too long, a size that the model does not draw, too little memory.
        """
        request = self._request(
            prompt, size, images_per_prompt, seed, sampler, batch_size, first_index
        )
        _ = self.params  # before a bar is shown: they may be damaged
        images = []
        total = request.steps * -(-len(request.keys) // request.batch_size)
        with Progress(total, "patch", "drawing", shown=progress) as bar:
            for start in range(0, len(request.keys), request.batch_size):
                before = bar.n
                for state, sampled in self._sample(
                    request, start, max(1, request.steps // REPORTS)
                ):
                    jax.block_until_ready(state.patch)
                    bar.advance(before + sampled - bar.n)
                with bar.doing("decoding"):
                    images.append(self._images(request, start, state.values, request.steps))
        return np.concatenate(images)

    def generate_steps(
        self,
        prompt: str | Sequence[str],
        *,
        every: int,
        size: str | tuple[int, int] = "1024x1024",
        images_per_prompt: int = 1,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        first_index: int = 0,
    ) -> Iterator[Partial]:
        """`generate` of one batch, seen while it is drawn: what there is after the first patch, after every `every` more, and at the end.

        The same compiled programs as `generate` of that batch; the last images are those that it gives.
        """
        every = checked(Count, every, "every")
        request = self._request(prompt, size, images_per_prompt, seed, sampler, None, first_index)
        for state, sampled in self._sample(request, 0, every):
            yield Partial(sampled, request.steps, self._images(request, 0, state.values, sampled))

    def _request(
        self,
        prompt: str | Sequence[str],
        size: str | tuple[int, int],
        images_per_prompt: int,
        seed: int,
        sampler: SamplerConfig | None,
        batch_size: int | None,
        first_index: int,
    ) -> "_Request":
        height, width = parse_size(size)
        model.check_size(self.config, height, width)
        prompts = checked(
            tuple[str, ...], [prompt] if isinstance(prompt, str) else prompt, "prompt"
        )
        images_per_prompt = checked(Count, images_per_prompt, "images_per_prompt")
        count = checked(Count, len(prompts), "the number of prompts") * images_per_prompt
        batch_size = min(checked(Count | None, batch_size, "batch_size") or count, count)
        sampler = checked(SamplerConfig | None, sampler, "sampler") or self.sampler
        ids = [self._prompts.encode(text, MAX_PROMPT) for text in prompts]
        rows = [*ids, self._prompts.unconditional()]
        tokens, padding = model.prefix_rows(self.config, rows, height, width)
        chosen = np.repeat(np.arange(len(prompts)), images_per_prompt)
        self._check_memory((height, width), batch_size, sampler)
        return _Request(
            tokens=np.asarray(tokens),
            padding=np.asarray(padding),
            prompts=chosen,
            keys=np.asarray(jax.random.key_data(image_keys(seed, first_index, count))),
            xy=model.token_positions(self.config, height, width),
            grid=height // self.config.tokenizer.downsampling,
            size=(height, width),
            steps=height * width // self.config.size_multiple**2,
            sampler=sampler,
            batch_size=batch_size,
        )

    def _check_memory(self, size: tuple[int, int], images: int, sampler: SamplerConfig) -> None:
        device = self.mesh.devices.flat[0]
        if (
            self._params is None or device.platform != "cpu"
        ):  # of a CPU's memory, weights that are loaded are taken already
            setting = memory.Setting(
                self.config,
                self._weights,
                self._dtype.name,
                self.mesh.devices.shape,
                size,
                images,
                sampler,
            )
            memory.check(setting, device)

    def _sample(
        self, request: "_Request", start: int, every: int
    ) -> Iterator[tuple[SamplerState, int]]:
        """`CompiledSampler.states` of the batch of images from `start` on."""
        prefixes, keys = request.batch(start)
        solver, scales = resolve(request.sampler, self.config.head.time_shift, request.steps)
        options: Any = {
            "solver": solver,
            "scales": scales,
            "num_patches": request.steps,
            "every": every,
        }
        return self._programs.states(self.params["model"], (prefixes, request.xy), keys, **options)

    def _images(
        self, request: "_Request", start: int, values: Float[Array, "N B P K"], sampled: int
    ) -> UInt8[np.ndarray, "count H W 3"]:
        """A few at a time, to bound memory."""
        height, width = request.size
        _, keys = request.batch(start)
        sequences, chunk = fill_in(multihost.gather(values), sampled), chunk_size(height, width)
        parts = []
        for (part, count), (part_keys, _) in zip(
            chunks(sequences, chunk), chunks(keys, chunk), strict=True
        ):
            parts.append(
                multihost.gather(
                    self._programs.decode(
                        self.params["tokenizer"], part, part_keys, height=request.grid
                    )
                )[:count]
            )
        images = np.concatenate(parts)[: len(request.keys) - start]
        return grey_out(
            images,
            request.xy[sampled * self.config.tokens_per_step :],
            self.config.tokenizer.downsampling,
        )

    def _place(self, path: tuple[str, ...], stored: model_folder.StoredArray) -> Any:
        how = kept(self.mesh, path, stored.shape, self._dtype, self._weights)
        if how is None:
            return None
        array = jax.make_array_from_callback(
            stored.shape, how.place, lambda index: stored[index].astype(how.dtype)
        )
        return quantize.quantize(array) if how.int8 else array


class _Request(NamedTuple):
    """What `generate` was asked for, checked.

    Attributes:
      tokens, padding: of every prompt, and of the unconditional one, which comes last.
      prompts: of every image, the number of its prompt.
      keys: of every image, as numbers.
      xy: of every token.
      grid: rows of tokens.
      size: height and width in pixels.
      steps: patches of an image.
      sampler: solver and guidance.
      batch_size: images drawn at a time.
    """

    tokens: Int[np.ndarray, "Q S"]
    padding: Int[np.ndarray, "Q"]
    prompts: Int[np.ndarray, "N"]
    keys: np.ndarray
    xy: Int[np.ndarray, "T 2"]
    grid: int
    size: tuple[int, int]
    steps: int
    sampler: SamplerConfig
    batch_size: int

    def batch(self, start: int) -> tuple[Prefixes, np.ndarray]:
        """Prefixes and keys of the images from `start` on. The last image fills a last batch up, to keep one compiled shape."""
        images = np.arange(start, start + self.batch_size).clip(max=len(self.keys) - 1)
        rows = self.prompts[images]
        if rows_of_image(self.sampler) == 2:
            rows = np.concatenate([rows, np.full_like(rows, len(self.tokens) - 1)])
        return Prefixes(self.tokens[rows], self.padding[rows]), self.keys[images]


def parse_size(size: str | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of "WIDTHxHEIGHT", or of (height, width).

    Raises:
      UserError: it is neither.
    """
    if not isinstance(size, str):
        height, width = checked(tuple[Count, Count], size, "size")
        return height, width
    match = re.fullmatch(r"(\d{1,9})\s*[xX×]\s*(\d{1,9})", size.strip())
    if match is None:
        raise UserError(f"a size is WIDTHxHEIGHT in pixels, such as 1024x1024, got {short(size)}")
    return int(match[2]), int(match[1])
