"""The config of text-to-image training, without what it makes."""

import dataclasses
from dataclasses import dataclass

from bitdance_jax.config import LoraConfig, SamplerConfig, TextToImageConfig, to_dict
from bitdance_jax.config.plain import BatchSize, Count, NotNegative, PathName, Share, Size, require
from bitdance_jax.data.buckets import Buckets
from bitdance_jax.data.captioned_config import CaptionedDataConfig
from bitdance_jax.data.conversation_config import ConversationDataConfig
from bitdance_jax.data.documents import TextLoss
from bitdance_jax.data.edit_config import EditDataConfig
from bitdance_jax.data.packing import Lengths
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.models.text_to_image import MAX_PROMPT, check_size
from bitdance_jax.pipelines import checks
from bitdance_jax.pipelines.text_to_image import RELEASED_SAMPLER
from bitdance_jax.train.task import TrainingConfig


AROUND_IMAGE = 4
"""Tokens of a document that are neither prompt nor of the image's blocks."""

SHORTEST_PROMPT = 32
"""Tokens that there must be for a prompt with its template."""

BYTES = "bytes"
"""Names the prompt tokenizer that has a token for each byte, and no file."""

CAPTIONS = "captions"
"""Names the prompt tokenizer that is made from the captions of the training data."""


@dataclass(frozen=True)
class PackedDataConfig(CaptionedDataConfig):
    """Captioned images, packed into rows.

    Attributes:
      batch_size: rows of a step. Of 33,280 tokens, a row has about 26 images at 256, 512 and 1024
        pixels as 2:7:1, or 8 of 1024 pixels.
      packing: lengths of the rows.
      max_prompt: tokens of the longest prompt with its template; longer captions are cut.
      conversations: about images, which the model learns to answer.
      edits: pairs of images, of which the model learns to make the second from the first.
      cache_latents: run the tokenizer once over all captioned images and pairs when the run starts,
        and keep their tokens in memory: for small datasets, on each process.
    """

    batch_size: BatchSize = 32
    packing: Lengths = Lengths()
    max_prompt: Size = MAX_PROMPT
    conversations: ConversationDataConfig = ConversationDataConfig()
    edits: EditDataConfig = EditDataConfig()
    cache_latents: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.captioned_share > 0,
            "conversations.share and edits.share must leave a share for captioned images, got "
            f"{self.conversations.share} and {self.edits.share}",
            "edits.share",
        )

    @property
    def source_names(self) -> tuple[str, ...]:
        """Of what documents are from, in metrics: the numbers of `paths`, and other kinds."""
        names = [f"source_{number}" for number in range(1, len(self.paths) + 1)]
        if self.conversations.paths:
            names.append("conversations")
        if self.edits.paths:
            names.append("edits")
        return tuple(names)

    @property
    def captioned_share(self) -> float:
        """Of the samples: what conversations and pairs leave."""
        others = [kind.share for kind in (self.conversations, self.edits) if kind.paths]
        return round(1.0 - sum(others), 9)


@dataclass(frozen=True)
class PreviewConfig(SamplerConfig):
    """Images that are sampled while a run trains, and the sampler of the exported model.

    Attributes:
      prompts: text file with one prompt a line; None: captions of held-out images.
      size: WIDTHxHEIGHT; None: the square of the largest resolution that is trained.
      per_prompt: images of each prompt.
    """

    prompts: PathName | None = None
    size: str | None = None
    per_prompt: Count = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            checks.parse_size(self.size)

    @property
    def sampler(self) -> SamplerConfig:
        """Without the other fields."""
        names = [field.name for field in dataclasses.fields(SamplerConfig)]
        return SamplerConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class TextToImageSettings(TrainingConfig):
    """What a training run of a text-to-image model is: the fields of `TextToImageTraining`.

    Attributes:
      model: its sizes.
      data: captioned images.
      tokenizer: model folder with the trained image tokenizer, which is frozen here; None: that of
        `init`.
      text_tokenizer: model folder, or folder of tokenizer files; "bytes": a token for each byte;
        "captions": a byte-level BPE made from those of the training data; None: those of `init`.
      text_loss: which text tokens are predicted: "all", the "caption" alone, or "none".
      vision_weight, text_weight: of the two losses.
      flip_rate: of the bits that the transformer reads.
      head_repeats: noisy versions of each patch for the head.
      freeze: parts that do not train and stay those of `init`, by their paths or the first parts of
        them, with `*` for anything: "text", "connector", "head", "text/embed_tokens",
        "text/layers/mlp".
      lora: adapters that are trained in place of all weights, which stay those of `init`;
        `lora.rank` 0: none.
      preview: the images while training, and the sampler of the exported model.
    """

    model: TextToImageConfig
    data: PackedDataConfig = PackedDataConfig()  # type: ignore[assignment]
    tokenizer: PathName | None = None
    text_tokenizer: PathName | None = None
    text_loss: TextLoss = "all"
    vision_weight: NotNegative = 1.0
    text_weight: NotNegative = 0.01
    flip_rate: Share = 0.1
    head_repeats: Count = 1
    freeze: tuple[str, ...] = ()
    lora: LoraConfig = LoraConfig()
    preview: PreviewConfig = PreviewConfig(**to_dict(RELEASED_SAMPLER))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, what in (
            ("tokenizer", "model folder of an image tokenizer"),
            ("text_tokenizer", "folder of tokenizer files"),
        ):
            require(
                getattr(self, name) is not None or self.init is not None,
                f"{name} needs a {what}, or init the folder of a text-to-image model",
                name,
            )
        require(
            self.vision_weight > 0 or self.text_weight > 0,
            "vision_weight and text_weight are both 0: there is no loss",
            "vision_weight",
        )
        require(
            not self.freeze or self.init is not None,
            "freeze keeps weights as they are in init; set init, a text-to-image model",
            "init",
        )
        if self.lora.rank:
            require(
                self.init is not None and not self.freeze,
                "lora.rank adapts the weights of init, all of which are frozen; set init, and no "
                "freeze",
                "lora.rank",
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raises a ConfigError for images that the model does not take, or that fit no row."""
        for resolution in self.data.resolutions:
            self._check_resolution(resolution, "data.resolutions")
        conversations, edits = self.data.conversations, self.data.edits
        if conversations.paths:
            self._check_resolution(conversations.resolution, "data.conversations.resolution")
        if edits.paths:
            self._check_resolution(edits.resolution, "data.edits.resolution", images=2)
        if self.preview.size is not None:
            height, width = checks.parse_size(self.preview.size)
            try:
                check_size(self.model, height, width)
            except UserError as error:
                raise ConfigError(f"preview.size: {error}", "preview.size") from error

    def _check_resolution(self, resolution: int, field: str, images: int = 1) -> None:
        """The same for the buckets of a resolution, which `field` sets; `images`: of a document,
        all but one of them only read."""
        multiple = self.model.size_multiple
        require(
            resolution % multiple == 0,
            f"{field} must be multiples of {multiple} pixels, the side of the model's patches, got"
            f" {resolution}",
            field,
        )
        packing = self.data.packing
        sizes = Buckets(resolution, multiple).sizes
        down = self.model.tokenizer.downsampling
        tokens = max(height * width for height, width in sizes) // down**2
        around = images * AROUND_IMAGE + self.model.tokens_per_step
        needed = images * tokens + around + SHORTEST_PROMPT
        require(
            needed <= packing.longest,
            f"{'an image' if images == 1 else 'two images'} of {resolution} pixels ({field})"
            f" and a short text are {needed} tokens, and a document has at most"
            f" {packing.longest}; raise data.packing.document and data.packing.row, or lower"
            f" {field}",
            "data.packing.document",
        )
