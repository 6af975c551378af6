"""Documents of conversations about images and of edits, for text-to-image training (paper 3.3)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bitdance_jax.config import TextToImageConfig
from bitdance_jax.data.conversations import IMAGE, Turn
from bitdance_jax.data.documents import Document, Image, Text, make_document
from bitdance_jax.text.prompt_tokenizer import DEFAULT_QUESTION, PromptTokenizer


def conversation_document(
    config: TextToImageConfig,
    tokenizer: PromptTokenizer,
    turns: Sequence[Turn],
    images: Sequence[Image],
    *,
    max_tokens: int,
) -> Document:
    """The document of a conversation.

    A turn of the user reads its images first, each up to `<|vision_end|>`, then its text in the
    template of prompts: so the model is asked in the same way (`TextToImage.describe`, `edit`).
    The loss covers what the assistant says, up to `<|im_end|>`, and the images that it generates.

    Args:
      config: of the model.
      tokenizer: the model's.
      turns: with IMAGE for each image; a system's turn counts as text of the user's.
      images: in the order of the placeholders. Those of the assistant are generated.
      max_tokens: of the text of a turn, with its template.

    Raises:
      LongPrompt: a turn has more.
      ConfigError: an image has a size that the model does not take.
    """
    left = list(images)
    segments: list[Text | Image] = []
    system = ""
    for number, turn in enumerate(turns):
        if turn.role == "system":
            system = f"{turn.text}\n"
        elif turn.role == "user":
            if number > 0 and segments:
                segments.append(_unpredicted(tokenizer.between_turns()))
            shown = [left.pop(0) for _ in range(turn.text.count(IMAGE))]
            for image in shown:
                segments.append(replace(image, generated=False))
                segments.append(_unpredicted(tokenizer.end_of_image()[:1]))
            text = turn.text.replace(IMAGE, "").strip() or DEFAULT_QUESTION
            segments.append(_unpredicted(tokenizer.encode(system + text, max_tokens)))
            system = ""
        else:
            segments += _answer(tokenizer, turn.text, left, max_tokens)
    return make_document(config, segments)


def edit_document(
    config: TextToImageConfig,
    tokenizer: PromptTokenizer,
    instruction: str | None,
    source: Image,
    target: Image,
    *,
    max_tokens: int,
) -> Document:
    """The document of an image, an instruction, and the image that it makes of it.

    It is that of a conversation of one turn. Without the instruction it is what guidance sees: the
    image and the unconditional prompt, without text loss.

    Args:
      config: of the model.
      tokenizer: the model's.
      instruction: None for a dropped one.
      source: is read.
      target: is generated.
      max_tokens: of the instruction with its template.

    Raises:
      LongPrompt: the instruction is longer.
      ConfigError: it is empty, or an image has a size that the model does not take.
    """
    if instruction is not None:
        turns = [Turn("user", f"{IMAGE}\n{instruction}"), Turn("assistant", IMAGE)]
        return conversation_document(
            config, tokenizer, turns, [source, target], max_tokens=max_tokens
        )
    end = tokenizer.end_of_image()
    segments: list[Text | Image] = [
        replace(source, generated=False),
        _unpredicted([end[0], *tokenizer.unconditional()]),
        replace(target, generated=True),
        _unpredicted(end),
    ]
    return make_document(config, segments)


def _answer(
    tokenizer: PromptTokenizer, text: str, left: list[Image], max_tokens: int
) -> list[Text | Image]:
    """What the assistant says and generates, up to `<|im_end|>`. Takes its images from `left`."""
    vision_end, end = tokenizer.end_of_image()
    segments: list[Text | Image] = []
    before, *others = text.split(IMAGE)
    tokens = tokenizer.encode_answer(before.strip(), max_tokens)
    for part in others:
        if tokens:
            segments.append(_predicted(tokens))
        segments.append(replace(left.pop(0), generated=True))
        segments.append(_unpredicted([vision_end]))
        tokens = tokenizer.encode_answer(part.strip(), max_tokens)
    return [*segments, _predicted([*tokens, end])]


def _predicted(tokens: Sequence[int]) -> Text:
    return Text(np.array(tokens), np.ones(len(tokens), bool))


def _unpredicted(tokens: Sequence[int]) -> Text:
    return Text(np.array(tokens), np.zeros(len(tokens), bool))
