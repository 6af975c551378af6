"""Documents of captioned images, for text-to-image training."""

from typing import Any

from bitdance_jax.data.conversation_documents import conversation_document
from bitdance_jax.data.conversations import ConversationSample
from bitdance_jax.data.documents import Document, Image, captioned_image
from bitdance_jax.data.mixture import Sample
from bitdance_jax.data.packed_batches import Note, Prepared
from bitdance_jax.errors import UserError
from bitdance_jax.text.prompt_tokenizer import LongPrompt, PromptTokenizer
from bitdance_jax.train.text_to_image_config import (
    AROUND_IMAGE,
    SHORTEST_PROMPT,
    TextToImageSettings,
)


AnySample = Sample | ConversationSample


class Documents:
    """Makes the documents of samples, in worker processes too."""

    def __init__(self, config: TextToImageSettings, prompts: PromptTokenizer) -> None:
        self._config = config
        self._prompts = prompts

    def __call__(self, sample: AnySample) -> Prepared:
        """Without a document if it is too long: if not even a caption of a few words fits beside
        the image.

        Raises:
          UserError: the image has a longer side than the model takes.
        """
        notes: list[Note] = []
        if isinstance(sample, ConversationSample):
            document = self._conversation(sample, notes)
        else:
            document = self._image(sample, notes)
        return Prepared(document, tuple(sample.skipped), tuple(notes))

    def _image(self, sample: Sample, notes: list[Note]) -> Document | None:
        for line in sample.too_small:
            notes.append(Note("images too small", f"{line}; the next one replaces it"))
        config = self._config
        down = config.model.tokenizer.downsampling
        height, width = sample.size
        largest = config.model.largest_side
        if max(height, width) > largest:
            raise UserError(
                f"the image of {self._named(sample)} has {width}x{height} pixels, and the model "
                f"takes sides up to {largest}; crop the images to squares, lower data.resolutions, "
                "or raise model.image_tokens.num_resolutions"
            )
        image_tokens = height * width // down**2 + config.model.tokens_per_step + AROUND_IMAGE
        limit = min(config.data.max_prompt, config.data.packing.longest - image_tokens)
        if limit < SHORTEST_PROMPT:
            notes.append(
                Note(
                    "samples skipped",
                    f"the image of {self._named(sample)} has {width}x{height} pixels, "
                    f"{image_tokens} tokens, and a document {config.data.packing.longest} at most; "
                    "it is skipped",
                )
            )
            return None
        return self._document(sample, limit, notes)

    def _conversation(self, sample: ConversationSample, notes: list[Note]) -> Document | None:
        config = self._config
        turns = sample.record.turns
        images = [Image(None, image.shape[:2], pixels=image) for image in sample.record.images]
        try:
            document = conversation_document(
                config.model, self._prompts, turns, images, max_tokens=config.data.max_prompt
            )
        except LongPrompt:
            notes.append(
                Note(
                    "conversations skipped",
                    f"the conversation {turns[0].text[:40]!r} in {sample.source} has a turn of "
                    f"more than {config.data.max_prompt} tokens (data.max_prompt); it is skipped",
                )
            )
            return None
        longest = config.data.packing.longest
        if len(document) > longest:
            notes.append(
                Note(
                    "conversations skipped",
                    f"the conversation {turns[0].text[:40]!r} in {sample.source} has "
                    f"{len(document)} tokens, and a document {longest} at most "
                    "(data.packing.document); it is skipped",
                )
            )
            return None
        return document

    def _document(self, sample: Sample, limit: int, notes: list[Note]) -> Document:
        config = self._config
        record = sample.record
        image = Image(None, sample.size, pixels=record.image)
        if record.tokens is not None:
            image = image.encoded(record.tokens.bits, config.model.patch_side)
        options: Any = {"text_loss": config.text_loss, "max_tokens": limit}
        try:
            return captioned_image(config.model, self._prompts, sample.caption, image, **options)
        except LongPrompt:
            notes.append(
                Note(
                    "captions cut",
                    f"the caption of {self._named(sample)} has more than {limit} tokens with its "
                    "template (data.max_prompt, data.packing.document); it is cut",
                )
            )
            return captioned_image(
                config.model, self._prompts, sample.caption, image, truncate=True, **options
            )

    def _named(self, sample: Sample) -> str:
        caption = sample.caption or ""
        return f"{caption[:40]!r} in {sample.source}"
