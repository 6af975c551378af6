"""What all models that sample images have in common."""

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from PIL import Image

from bitdance_jax.config import ClassConditionalConfig, SamplerConfig, TextToImageConfig, to_dict
from bitdance_jax.config.plain import Count, checked
from bitdance_jax.errors import ConfigError
from bitdance_jax.pipelines import checks, given_images, weighted, weights
from bitdance_jax.pipelines.batching import ImageKeys, Seeds
from bitdance_jax.pipelines.execution import Execution, whole_parts
from bitdance_jax.pipelines.given_images import Given, ImageCodes, MaskLike, encode
from bitdance_jax.pipelines.image_prompts import ImageLike
from bitdance_jax.pipelines.partial_images import Partial
from bitdance_jax.pipelines.request import LabelsOrPrompts, Request, Size
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.pipelines.weighted import Conditions
from bitdance_jax.pipelines.weights import Params
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.guidance import rows_of_image


Output = Literal["numpy", "pil", "codes"]
GivenImages = Given | Sequence[Given] | None


class Pipeline(abc.ABC):
    """A model that samples images, with its tokenizer: class-conditional or text to image.

    `bitdance_jax.load` makes one from a folder, the subclasses from weights in memory. Programs are
    compiled once for each size, batch size, solver, number of steps and bucket of prompt lengths;
    guidance scale and schedule, seeds and indices are their arguments.

    Attributes:
      kind: of the model, as in its folder.
      config: sizes.
      sampler: solver and guidance where a call does not give its own.
      mesh: the devices.
      dtype: compute type.
      name: of the model, for the text in saved images.
      class_names: of each label; () for text to image.
      default_size: (height, width) in pixels.
      default_batch_size: images at a time, on all devices together.
    """

    kind: Literal["class_conditional", "text_to_image"]
    input_kind: Literal["label", "prompt"]
    config: ClassConditionalConfig | TextToImageConfig
    class_names: tuple[str, ...] = ()
    default_size: tuple[int, int]
    default_batch_size: int

    def __init__(
        self,
        params: Params | None,
        tokenizer: Tokenizer,
        *,
        sampler: SamplerConfig,
        dtype: jnp.dtype,
        mesh: Mesh,
        weights: str,
        name: str,
    ) -> None:
        self.sampler = sampler
        self.dtype = dtype
        self.mesh = mesh
        self.name = name
        self._weights = weights
        self._tokenizer = tokenizer
        self._execution = Execution(self.config, mesh, dtype)
        self._params: Params | None = None
        self.set_params(params)

    @property
    def tokenizer(self) -> Tokenizer:
        """Encodes and decodes images."""
        return self._tokenizer

    @property
    def params(self) -> Params:
        """All weights as sampling stores them: {"model": unstacked, "tokenizer": its decoder}.

        A lazy pipeline reads them here.
        """
        if self._params is None:
            self._params = self._read_params()
        return self._params

    def _read_params(self) -> Params:
        raise ValueError("the pipeline has no weights; call set_params")

    def set_params(self, params: Params | None) -> None:
        """Sets other weights of the model, stacked, without compiling; None frees their memory."""
        self._params = None
        if params is not None:
            decoder = {"decoder": self._tokenizer.params["decoder"]}
            both = {"model": params, "tokenizer": decoder}
            self._params = weights.place(self.mesh, both, self.dtype, self._weights)

    @overload
    def sample(
        self,
        inputs: LabelsOrPrompts,
        seed: Seeds = 0,
        *,
        images_per_input: int = 1,
        size: Size | None = None,
        sampler: SamplerConfig | str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        given: GivenImages = None,
        batch_size: int | None = None,
        first_index: int = 0,
        output: Literal["numpy", "codes"] = "numpy",
        progress: bool = True,
    ) -> np.ndarray: ...

    @overload
    def sample(
        self,
        inputs: LabelsOrPrompts,
        seed: Seeds = 0,
        *,
        images_per_input: int = 1,
        size: Size | None = None,
        sampler: SamplerConfig | str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        given: GivenImages = None,
        batch_size: int | None = None,
        first_index: int = 0,
        output: Literal["pil"],
        progress: bool = True,
    ) -> list[Image.Image]: ...

    def sample(
        self,
        inputs: LabelsOrPrompts,
        seed: Seeds = 0,
        *,
        images_per_input: int = 1,
        size: Size | None = None,
        sampler: SamplerConfig | str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        given: GivenImages = None,
        batch_size: int | None = None,
        first_index: int = 0,
        output: Output = "numpy",
        progress: bool = True,
    ) -> np.ndarray | list[Image.Image]:
        """Images of labels or prompts: `images_per_input` of the first, then of the second, ...

        Image i has the index `first_index` + i. It depends only on its input, the seed and its
        index: not on the batch size or the other images, up to rounding.

        Args:
          inputs: one or several: labels, 0 ... num_classes - 1 or class names, or prompts.
          seed: of 32 bits; or a list, one for each image: then image i is the one that
            `seed=seed[i]` gives at the index `first_index`.
          images_per_input: images of each.
          size: of text-to-image models; see `Size`. The default is `default_size`, or the size of
            the first given image that is not placed on a larger canvas.
          sampler: solver and guidance; None: the model's own; "fast": another solver with the
            model's guidance (`SamplerConfig.named`).
          negative_prompt: of text-to-image models: what the images should not show, in place of
            guidance's unconditional prompt; one for all inputs, or one for each.
          given: an image of which patches are kept, for all inputs, or one for each; see
            `complete`.
          batch_size: images at a time, on all devices together.
          first_index: index of the first image, to continue with the images of a seed.
          output: "numpy", uint8 [B, H, W, 3]; "pil", a list of PIL images, with `metadata` as their
            `info`; or "codes", [B, h, w, K], for `tokenizer.decode`: int8 in {-1, 1}, or float32
            if the tokenizer's latents are continuous.
          progress: show a bar.

        Raises:
          UserError: an input or argument that the model does not take, or too little memory.
        """
        output = checked(Output, output, "output")
        request = self._request(
            inputs,
            seed,
            images_per_input,
            size,
            sampler,
            negative_prompt,
            given,
            batch_size,
            first_index,
            shrink=True,
        )
        _ = self.params  # before a bar is shown: they may be damaged
        request = self._encoded(request)
        arrays = self._execution.arrays(self.params, request, output == "codes", progress)
        if output != "pil":
            return arrays
        images = [Image.fromarray(array) for array in arrays]
        for i, image in enumerate(images):
            image.info.update(self._describe(request, i))
        return images

    def complete(
        self,
        image: ImageLike | ImageCodes,
        mask: MaskLike | None,
        inputs: LabelsOrPrompts,
        seed: Seeds = 0,
        *,
        keep_patches: int | None = None,
        at: tuple[int, int] | None = None,
        paste: bool = False,
        **options: Any,
    ) -> np.ndarray | list[Image.Image]:
        """`sample` of an image of which a part is given: `given=Given(image, mask, ...)`.

        Given patches are read in place of sampled ones, so the others are sampled from what the
        model knows of the patches before them, in its order; it does not see the later ones.
        With nothing kept the images are those of `sample`.

        Args:
          image, mask, keep_patches, at, paste: see `Given`. `sample(given=[...])` takes several.
          inputs, seed: see `sample`.
          options: the other arguments of `sample`.

        Raises:
          UserError: as `sample`, an image or mask that cannot be read or is of another size, or
            nothing to sample.
        """
        given = Given(image, mask, keep_patches, at, paste)
        return self.sample(inputs, seed, given=given, **options)

    def sample_steps(
        self,
        inputs: LabelsOrPrompts,
        seed: Seeds = 0,
        *,
        every: int,
        images_per_input: int = 1,
        size: Size | None = None,
        sampler: SamplerConfig | str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        given: GivenImages = None,
        first_index: int = 0,
    ) -> Iterator[Partial]:
        """One batch of `sample` after the first patch, each `every` more patches, and the last.

        The last images are those of `sample` with this batch size.

        Raises:
          UserError: as `sample`; `every` is not positive; no inputs.
        """
        every = checked(Count, every, "every")
        request = self._request(
            inputs,
            seed,
            images_per_input,
            size,
            sampler,
            negative_prompt,
            given,
            None,
            first_index,
            shrink=True,
        )
        if not request.keys.count:
            raise ConfigError("inputs is empty; give a label or a prompt", "inputs")
        request = self._encoded(request)._replace(batch_size=request.keys.count)
        yield from self._execution.steps(self.params, request, every)

    def batches(
        self,
        inputs: LabelsOrPrompts,
        seed: Seeds = 0,
        *,
        images_per_input: int = 1,
        size: Size | None = None,
        sampler: SamplerConfig | str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        given: GivenImages = None,
        batch_size: int | None = None,
        first_index: int = 0,
    ) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        """`sample` batch by batch; the devices sample the next batch while the caller has one.

        Every batch is computed in full, a short last one too. So on a data mesh an image is the
        same, bit for bit, on any number of devices, if `batch_size` is a multiple of their number
        and the same for each device.
        """
        request = self._request(
            inputs,
            seed,
            images_per_input,
            size,
            sampler,
            negative_prompt,
            given,
            batch_size,
            first_index,
            shrink=False,
        )
        yield from self._execution.batches(self.params, self._encoded(request))

    def metadata(
        self,
        inputs: LabelsOrPrompts,
        seed: Seeds = 0,
        *,
        images_per_input: int = 1,
        size: Size | None = None,
        sampler: SamplerConfig | str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        given: GivenImages = None,
        first_index: int = 0,
    ) -> list[dict[str, str]]:
        """The label or prompt, seed, index, model, steps, solver and guidance of each image, and of
        completed ones the kept patches.

        `image_files.save_png` takes them as text chunks.
        """
        request = self._request(
            inputs,
            seed,
            images_per_input,
            size,
            sampler,
            negative_prompt,
            given,
            1,
            first_index,
            shrink=False,
        )
        return [self._describe(request, i) for i in range(request.keys.count)]

    def num_patches(self, size: Size | None = None) -> int:
        """Patches of an image, the default size's or another's."""
        height, width = self._checked_size(size)
        patch = self.config.tokenizer.downsampling * self.config.patch_side
        return height * width // patch**2

    @abc.abstractmethod
    def _checked_size(self, size: Size | None) -> tuple[int, int]:
        """(height, width) in pixels, which the model can sample."""

    @abc.abstractmethod
    def _checked_inputs(
        self, asked: Conditions, size: tuple[int, int], negative: tuple[str, ...] | None
    ) -> tuple[Any, Any, Callable[[int], str]]:
        """`Request.inputs`, `shared`, and the text of a condition, by its number."""

    def _checked_negative(
        self, prompt: Any, sampler: SamplerConfig, asked: Conditions
    ) -> tuple[str, ...] | None:
        """Negative prompts, one for all images or one for each."""
        if prompt is None:
            return None
        if self.kind == "class_conditional":
            raise ConfigError(
                "a class-conditional model has no prompts; omit negative_prompt", "negative_prompt"
            )
        if asked.weights is None and sampler.guidance_scale == 1:
            raise ConfigError(
                "negative_prompt needs guidance; set guidance_scale above 1", "negative_prompt"
            )
        return checked(tuple[str, ...], checks.items(prompt, "negative_prompt"), "negative_prompt")

    @abc.abstractmethod
    def _token_positions(self, size: tuple[int, int]) -> Int[np.ndarray, "T 2"]: ...

    def _check_memory(  # noqa: B027 a class-conditional model is checked when it is read
        self, size: tuple[int, int], images: int, sampler: SamplerConfig
    ) -> None:
        """Raises a ResourceError if a batch does not fit the devices."""

    def _request(
        self,
        inputs: LabelsOrPrompts,
        seed: Seeds,
        images_per_input: int,
        size: Size | None,
        sampler: SamplerConfig | str | None,
        negative_prompt: str | Sequence[str] | None,
        given: GivenImages,
        batch_size: int | None,
        first_index: int,
        *,
        shrink: bool,
    ) -> Request:
        """`shrink`: a batch has no more images than the call."""
        several = [] if given is None else checks.items(given, "given")
        opened = [given_images.read_image(one, self.config.tokenizer) for one in several]
        if size is None and opened and several[0].at is None:
            size = self._canvas_size(opened[0])
        pixels = self._checked_size(size)
        if len(several) > 1:
            inputs = given_images.one_for_each(inputs, len(several))
        each = checked(Count, images_per_input, "images_per_input")
        if isinstance(sampler, str):
            sampler = self.sampler.named(sampler)
        sampler = checked(SamplerConfig | None, sampler, "sampler") or self.sampler
        batch_size = checked(Count | None, batch_size, "batch_size") or self.default_batch_size
        asked = weighted.conditions(inputs, f"{self.input_kind}s")
        negative = self._checked_negative(negative_prompt, sampler, asked)
        rows, shared, input_name = self._checked_inputs(asked, pixels, negative)
        num_inputs = len(jax.tree.leaves(rows)[0])
        input_of_image = np.repeat(np.arange(num_inputs), each)
        if shrink:
            batch_size = whole_parts(self.mesh, min(batch_size, max(1, len(input_of_image))))
        keys = ImageKeys.checked(seed, first_index, len(input_of_image))
        if asked.weights is None:
            self._check_memory(pixels, batch_size, sampler)
        else:  # as many images as have these rows
            num_rows = batch_size * (asked.each + 1)
            self._check_memory(pixels, -(-num_rows // rows_of_image(sampler)), sampler)
        patches = self.num_patches(size)
        xy = self._token_positions(pixels)
        canvases = [
            given_images.place(
                *pair, pixels, xy=xy, num_patches=patches, config=self.config.tokenizer
            )
            for pair in zip(several, opened, strict=True)
        ]
        solver, scales = next_patch.resolve(
            sampler, self.config.head.time_shift, patches, weighted=asked.weights is not None
        )
        return Request(
            inputs=rows,
            shared=shared,
            input_name=asked.name_of_image(input_name),
            input_of_image=input_of_image,
            keys=keys,
            size=pixels,
            xy=xy,
            sampler=sampler,
            solver=solver,
            scales=scales,
            num_patches=patches,
            batch_size=batch_size,
            weights=asked.weights,
            negative=negative,
            canvases=None if given is None else given_images.for_inputs(canvases, num_inputs),
        )

    def _canvas_size(self, image: np.ndarray) -> Size | None:
        """The size of images that complete this one; None: the default."""
        return None

    def _encoded(self, request: Request) -> Request:
        """The request with the codes of its given images."""
        if not request.canvases:
            return request
        return request._replace(kept=encode(request.canvases, self.tokenizer, request.xy))

    def _describe(self, request: Request, image: int) -> dict[str, str]:
        seed, index = request.keys.seed_and_index(image)
        text = {
            self.input_kind: request.input_name(int(request.input_of_image[image])),
            "seed": str(seed),
            "index": str(index),
            "model": self.name,
        }
        settings = {name: str(value) for name, value in to_dict(request.sampler).items()}
        return text | request.texts(image) | settings


def common_description(descriptions: Sequence[dict[str, str]]) -> dict[str, str]:
    """The entries that all images of a grid share."""
    first = descriptions[0]
    return {
        name: text
        for name, text in first.items()
        if all(other.get(name) == text for other in descriptions)
    }
