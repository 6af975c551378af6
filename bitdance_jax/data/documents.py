"""Documents of text-to-image training: a prompt, images, and what follows them (paper 3.3, 4.3).

A document is a sequence of text tokens and images. A generated image is read as `<|vision_start|>`,
`<|res_h|>`, `<|res_w|>`, P - 1 queries and its visual tokens; an image that only conditions what
follows has no queries. Caption and size alone decide where everything stands, so an image may be
encoded later, when its document has a place in a batch.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int, UInt8

from bitdance_jax.config import TextToImageConfig
from bitdance_jax.errors import ConfigError
from bitdance_jax.models.prompt_rows import image_start
from bitdance_jax.models.text_to_image import MAX_PROMPT, check_size, token_positions
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer
from bitdance_jax.transformer import order


TextLoss = Literal["all", "caption", "none"]
"""Which text tokens are predicted: "all" of the prompt with its template and `<|im_end|>` after an
image; the "caption" with its `<|im_end|>` alone; or "none"."""

NO_LABEL = -1


@dataclass(frozen=True)
class Text:
    """Consecutive text tokens, read causally.

    Attributes:
      tokens: ids.
      predicted: whether the loss covers each of them, given the ones before it.
    """

    tokens: Int[np.ndarray, "T"]
    predicted: Bool[np.ndarray, "T"]


@dataclass(frozen=True)
class Image:
    """An image as packed bits, or as pixels that are still to be encoded.

    Attributes:
      bits: of the visual tokens in sequence order, packed as by `numpy.packbits`; None if there
        are pixels.
      size: height and width in pixels.
      generated: whether it is generated, patch by patch, or only read.
      pixels: RGB; None if there are bits.
    """

    bits: UInt8[np.ndarray, "T bytes"] | None
    size: tuple[int, int]
    generated: bool = True
    pixels: UInt8[np.ndarray, "H W 3"] | None = None

    def encoded(self, codes: UInt8[np.ndarray, "h w bytes"], patch_side: int) -> "Image":
        """The image with the bits of its tokens, which are given in raster order."""
        bits = order.grid_to_sequence(codes[None], patch_side, "patch")[0]
        return dataclasses.replace(self, bits=bits, pixels=None)


@dataclass(frozen=True)
class Document:
    """A document, position by position; N patches of all its images, each of P tokens.

    Attributes:
      tokens: ids, 0 at visual tokens.
      limits: of the position that each token's attention ends before: its own successor's, or that
        after the last token of its block.
      labels: id of the next token where the loss covers it, else NO_LABEL.
      visual: positions of the visual tokens.
      conditions: positions whose outputs predict these tokens; those of the patch itself if it is
        not generated.
      xy: column and row of the visual tokens in the grid of their image.
      generated: whether each patch is generated.
      area: number of tokens of the image that each patch belongs to.
      images: in order.
      source: number of the source that it is from.
    """

    tokens: Int[np.ndarray, "S"]
    limits: Int[np.ndarray, "S"]
    labels: Int[np.ndarray, "S"]
    visual: Int[np.ndarray, "N P"]
    conditions: Int[np.ndarray, "N P"]
    xy: Int[np.ndarray, "N P 2"]
    generated: Bool[np.ndarray, "N"]
    area: Int[np.ndarray, "N"]
    images: tuple[Image, ...] = ()
    source: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def with_images(self, images: Iterable[Image]) -> "Document":
        """With the same images in another form."""
        return dataclasses.replace(self, images=tuple(images))


def captioned_image(
    config: TextToImageConfig,
    tokenizer: PromptTokenizer,
    caption: str | None,
    image: Image,
    *,
    text_loss: TextLoss = "all",
    max_tokens: int = MAX_PROMPT,
    truncate: bool = False,
) -> Document:
    """The document of a caption and its image.

    Args:
      config: of the model.
      tokenizer: the model's.
      caption: None for a dropped one: the unconditional prompt, which has no text loss.
      image: its bits or pixels.
      text_loss: which tokens the loss covers.
      max_tokens: of the prompt with its template.
      truncate: cut a longer caption.

    Raises:
      LongPrompt: a longer caption, without `truncate`.
      ConfigError: an empty caption, or an image that the model does not take.
    """
    if caption is None:
        prompt = tokenizer.unconditional()
        predicted = np.zeros(len(prompt), bool)
    else:
        prompt = tokenizer.encode(caption, max_tokens, truncate=truncate)
        predicted = np.full(len(prompt), text_loss == "all")
        if text_loss == "caption":
            first = tokenizer.caption_start
            # The template behind the caption begins with <|im_end|>.
            behind = len(tokenizer.after_caption()) - 1
            predicted[first : len(prompt) - behind] = True
    end = tokenizer.end_of_image()
    has_loss = caption is not None and text_loss == "all"
    segments: list[Text | Image] = [
        Text(np.array(prompt), predicted),
        image,
        Text(np.array(end), np.array([False, has_loss])),
    ]
    return make_document(config, segments)


def make_document(config: TextToImageConfig, segments: Sequence[Text | Image]) -> Document:
    """The document of text and images in order.

    Args:
      config: of the model.
      segments: what the document consists of. Text has to follow a generated image: its last patch
        is read only because something follows.

    Raises:
      ConfigError: an image has a size that the model does not take, or bits of another shape.
    """
    images = tuple(segment for segment in segments if isinstance(segment, Image))
    for image in images:
        _check_image(config, image)
    blank, places = _blank(
        config,
        tuple(
            len(segment.tokens) if isinstance(segment, Text) else (segment.size, segment.generated)
            for segment in segments
        ),
    )
    tokens = blank.tokens.copy()
    predicted = np.zeros(len(tokens), bool)
    texts = [segment for segment in segments if isinstance(segment, Text)]
    for text, place in zip(texts, places, strict=True):
        tokens[place] = text.tokens
        predicted[place] = text.predicted
    # A token's label is at the position before it.
    labels = np.full(len(tokens), NO_LABEL, np.int32)
    labels[:-1] = np.where(predicted[1:], tokens[1:], NO_LABEL)
    return dataclasses.replace(blank, tokens=tokens, labels=labels, images=images)


def _check_image(config: TextToImageConfig, image: Image) -> None:
    height, width = image.size
    check_size(config, height, width)
    tokens = height * width // config.tokenizer.downsampling**2
    expected = (tokens, -(-config.tokenizer.bits // 8))
    if image.bits is not None and image.bits.shape != expected:
        raise ConfigError(
            f"an image of {width}x{height} has packed bits of shape {list(expected)}, got"
            f" {list(image.bits.shape)}; encode it with the model's tokenizer",
            "bits",
        )


_Part = int | tuple[tuple[int, int], bool]
"""Number of a text's tokens; or an image's size, and whether it is generated."""


@functools.lru_cache(maxsize=256)
def _blank(
    config: TextToImageConfig, parts: tuple[_Part, ...]
) -> tuple[Document, tuple[slice, ...]]:
    """The document of these parts without texts and images, and the positions of its texts.

    Its arrays are read-only: documents of the same parts share them.
    """
    builder = _Builder(config)
    for part in parts:
        if isinstance(part, int):
            builder.add_text(part)
        else:
            builder.add_image(*part)
    return builder.document(), tuple(builder.texts)


class _Builder:
    """A document's arrays while parts are appended.

    Attributes:
      texts: positions of the texts.
    """

    def __init__(self, config: TextToImageConfig) -> None:
        self._config = config
        self._tokens: list[int] = []
        self._limits: list[int] = []
        self._visual: list[np.ndarray] = []
        self._conditions: list[np.ndarray] = []
        self._xy: list[np.ndarray] = []
        self._generated: list[bool] = []
        self._area: list[int] = []
        self.texts: list[slice] = []

    def add_text(self, length: int) -> None:
        start = len(self._tokens)
        self.texts.append(slice(start, start + length))
        self._append_causal([0] * length)

    def add_image(self, size: tuple[int, int], is_generated: bool) -> None:
        config = self._config
        xy = token_positions(config, *size)
        *before, resolution_w = image_start(config, size)
        self._append_causal(before)
        block = config.tokens_per_step
        first = len(self._tokens)
        if is_generated:
            first_query = config.image_tokens.first_query
            queries = range(first_query, first_query + block - 1)
            self._append_blocks([resolution_w, *queries])
        else:
            self._append_causal([resolution_w])
        start = len(self._tokens)
        if is_generated:
            self._append_blocks([0] * len(xy))
        else:
            self._append_causal([0] * len(xy))
        visual = np.arange(start, start + len(xy)).reshape(-1, block)
        self._visual.append(visual)
        self._conditions.append(visual - start + first if is_generated else visual)
        self._xy.append(xy.reshape(-1, block, 2))
        self._generated += [is_generated] * len(visual)
        self._area += [len(xy)] * len(visual)

    def document(self) -> Document:
        """The document, with 0 in place of texts, and without images and labels."""
        block = self._config.tokens_per_step
        none = np.zeros((0, block), np.int32)
        arrays: dict[str, Any] = {
            "tokens": np.array(self._tokens, np.int32),
            "limits": np.array(self._limits, np.int32),
            "labels": np.full(len(self._tokens), NO_LABEL, np.int32),
            "visual": np.concatenate([none, *self._visual]).astype(np.int32),
            "conditions": np.concatenate([none, *self._conditions]).astype(np.int32),
            "xy": np.concatenate([np.zeros((0, block, 2), np.int32), *self._xy]).astype(np.int32),
            "generated": np.array(self._generated, bool),
            "area": np.array(self._area, np.int32),
        }
        for array in arrays.values():
            array.flags.writeable = False
        return Document(**arrays)

    def _append_causal(self, tokens: list[int]) -> None:
        start = len(self._tokens)
        self._tokens += tokens
        self._limits += range(start + 1, start + 1 + len(tokens))

    def _append_blocks(self, tokens: list[int]) -> None:
        block = self._config.tokens_per_step
        start = len(self._tokens)
        self._tokens += tokens
        self._limits += [start + (i // block + 1) * block for i in range(len(tokens))]
