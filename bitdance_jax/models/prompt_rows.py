"""Prompts as rows of tokens, padded to one length (paper 4.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int8

from bitdance_jax.config import TextToImageConfig
from bitdance_jax.errors import UserError
from bitdance_jax.models.text_to_image import (
    MAX_PROMPT,
    PREFIX_LENGTHS,
    Prefixes,
    ShownImages,
    check_size,
    token_positions,
)


@dataclass(frozen=True)
class ShownImage:
    """An image that a prompt shows.

    Attributes:
      bits: of its tokens in sequence order (`token_positions`), in {-1, 1}.
      size: height and width in pixels.
    """

    bits: Int8[np.ndarray, "T K"]
    size: tuple[int, int]


Prompt = Sequence[int | ShownImage]
"""Token ids, and images before their `<|vision_end|>`."""


def prefix_rows(
    config: TextToImageConfig, prompts: Sequence[Prompt], height: int, width: int
) -> Prefixes:
    """The rows of prompts, padded to the same length.

    Args:
      config: of the model.
      prompts: see Prompt.
      height, width: of the images to sample, in pixels.

    Raises:
      UserError: a size that the model cannot sample, a text longer than MAX_PROMPT, or a token that
        is not in the vocabulary.
    """
    check_size(config, height, width)
    ids = config.image_tokens
    queries = range(ids.first_query, ids.first_query + config.tokens_per_step - 1)
    image = [*image_start(config, (height, width)), *queries]
    return pad_prompts(config, prompts, image)


def pad_prompts(config: TextToImageConfig, prompts: Sequence[Prompt], end: list[int]) -> Prefixes:
    """Prompts with the tokens `end` behind each of them, padded to the same length.

    Raises as `prefix_rows`.
    """
    texts = [[token for token in prompt if isinstance(token, int)] for prompt in prompts]
    longest = max(map(len, texts))
    if longest > MAX_PROMPT:
        raise UserError(
            f"a prompt has {longest} tokens with its template, and at most {MAX_PROMPT} fit; "
            "make it shorter"
        )
    if (largest := max(max(text, default=0) for text in texts)) >= config.text.vocab_size:
        raise UserError(
            f"a prompt has the token {largest}, and the vocabulary {config.text.vocab_size}; "
            "use the model's own tokenizer files"
        )
    parts = [_expand(config, prompt) for prompt in prompts]
    # The first block comes behind the length that is rounded up.
    block = max(len(end) - 2, 0)
    length = _padded_length(max(len(tokens) for tokens, _, _ in parts) + len(end) - block) + block
    padding = np.array([length - len(tokens) - len(end) for tokens, _, _ in parts], np.int32)
    rows = [[0] * pad + [*tokens, *end] for pad, (tokens, _, _) in zip(padding, parts, strict=True)]
    shown = None
    if any(images for _, images, _ in parts):
        shown = _shown_images(config, parts, padding, length)
    return Prefixes(np.array(rows, np.int32), padding, shown)


Expanded = tuple[list[int], list[ShownImage], list[int]]
"""Token ids of a prompt, 0 at visual tokens; its images, and where their visual tokens start."""


def _expand(config: TextToImageConfig, prompt: Prompt) -> Expanded:
    tokens: list[int] = []
    images: list[ShownImage] = []
    starts: list[int] = []
    for part in prompt:
        if isinstance(part, ShownImage):
            tokens += image_start(config, part.size)
            images.append(part)
            starts.append(len(tokens))
            tokens += [0] * len(part.bits)
        else:
            tokens.append(part)
    return tokens, images, starts


def image_start(config: TextToImageConfig, size: tuple[int, int]) -> list[int]:
    """`<|vision_start|>`, `<|res_h|>`, `<|res_w|>` of an image of (height, width) pixels."""
    ids = config.image_tokens
    down = config.tokenizer.downsampling
    return [ids.vision_start, *(ids.first_resolution - 1 + side // down for side in size)]


def _padded_length(length: int) -> int:
    last = PREFIX_LENGTHS[-1]
    return next((n for n in PREFIX_LENGTHS if n >= length), -(-length // last) * last)


def _shown_images(
    config: TextToImageConfig,
    parts: Sequence[Expanded],
    padding: Int[np.ndarray, "R"],
    length: int,
) -> ShownImages:
    count = max(sum(len(image.bits) for image in images) for _, images, _ in parts)
    count = _padded_length(count)
    bits = np.ones((len(parts), count, config.tokenizer.bits), np.int8)
    xy = np.zeros((len(parts), count, 2), np.int32)
    slots = np.full((len(parts), count), length, np.int32)
    for row, (_, images, starts) in enumerate(parts):
        first = 0
        for image, start in zip(images, starts, strict=True):
            here = slice(first, first + len(image.bits))
            bits[row, here] = image.bits
            xy[row, here] = token_positions(config, *image.size)
            slots[row, here] = padding[row] + start + np.arange(len(image.bits))
            first = here.stop
    return ShownImages(bits, xy, slots)
