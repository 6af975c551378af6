"""Documents of captioned images, conversations and edits, for text-to-image training."""

import dataclasses
from typing import Any

from bitdance_jax.data.captioned import CaptionedImage
from bitdance_jax.data.conversation_documents import conversation_document, edit_document
from bitdance_jax.data.conversations import ConversationSample
from bitdance_jax.data.documents import Document, Image, captioned_image
from bitdance_jax.data.edits import EditSample
from bitdance_jax.data.mixture import Sample
from bitdance_jax.data.packed_batches import Note, Prepared
from bitdance_jax.errors import UserError
from bitdance_jax.text.prompt_tokenizer import LongPrompt, PromptTokenizer
from bitdance_jax.train.text_to_image_config import (
    AROUND_IMAGE,
    SHORTEST_PROMPT,
    TextToImageSettings,
)


AnySample = Sample | ConversationSample | EditSample


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
        names = self._config.data.source_names
        if isinstance(sample, ConversationSample):
            document, source = self._conversation(sample, notes), names.index("conversations")
        elif isinstance(sample, EditSample):
            document, source = self._edit(sample, notes), names.index("edits")
        else:
            document, source = self._image(sample, notes), sample.source_number
        if document is not None:
            document = dataclasses.replace(document, source=source)
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
        named = f"the conversation {turns[0].text[:40]!r} in {sample.source}"
        try:
            document = conversation_document(
                config.model, self._prompts, turns, images, max_tokens=config.data.max_prompt
            )
        except LongPrompt:
            notes.append(
                Note(
                    "conversations skipped",
                    f"{named} has a turn of more than {config.data.max_prompt} tokens "
                    "(data.max_prompt); it is skipped",
                )
            )
            return None
        return self._if_it_fits(document, named, "conversations skipped", notes)

    def _edit(self, sample: EditSample, notes: list[Note]) -> Document | None:
        config = self._config
        source, target = map(self._picture, (sample.record.source, sample.record.target))
        instruction = sample.instruction
        named = f"the instruction {(instruction or '')[:40]!r} in {sample.location}"
        try:
            document = edit_document(
                config.model,
                self._prompts,
                instruction,
                source,
                target,
                max_tokens=config.data.max_prompt,
            )
        except LongPrompt:
            notes.append(
                Note(
                    "pairs skipped",
                    f"{named} has more than {config.data.max_prompt} tokens with its template "
                    "(data.max_prompt); the pair is skipped",
                )
            )
            return None
        return self._if_it_fits(document, named, "pairs skipped", notes)

    def _if_it_fits(
        self, document: Document, named: str, problem: str, notes: list[Note]
    ) -> Document | None:
        longest = self._config.data.packing.longest
        if len(document) <= longest:
            return document
        notes.append(
            Note(
                problem,
                f"{named} has {len(document)} tokens with its images, and a document {longest} at "
                "most (data.packing.document); it is skipped",
            )
        )
        return None

    def _picture(self, record: CaptionedImage) -> Image:
        image = Image(None, record.size, pixels=record.image)
        if record.tokens is None:
            return image
        return image.encoded(record.tokens.bits, self._config.model.patch_side)

    def _document(self, sample: Sample, limit: int, notes: list[Note]) -> Document:
        config = self._config
        image = self._picture(sample.record)
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
