"""Sizes of the text-to-image models (paper 4.3); the released ones as named presets."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from bitdance_jax.config.head import FlowHeadConfig, HeadConfig
from bitdance_jax.config.model import TokenizerConfig
from bitdance_jax.config.plain import (
    Config,
    ConfigError,
    Depth,
    Natural,
    Positive,
    Range,
    Size,
    require,
)


QWEN3_VOCABULARY = 151_936
"""Rows of the embedding in every published Qwen3; those from 151,669 on are untrained."""

# Layers, width, query heads, width inside the MLP. All have 8 key heads of size 128.
QWEN3_SIZES = {
    "0.6b": (28, 1024, 16, 3072),
    "1.7b": (28, 2048, 16, 6144),
    "4b": (36, 2560, 32, 9728),
    "8b": (36, 4096, 32, 12288),
    "14b": (40, 5120, 40, 17408),
    "32b": (64, 5120, 64, 25600),
}


@dataclass(frozen=True)
class Qwen3Config(Config):
    """The Qwen3 language model, which reads the prompt and the bits.

    Attributes:
      num_layers: pre-norm blocks.
      dim: width; a multiple of 4 (the 2-D position embedding).
      num_heads: query heads.
      num_kv_heads: key and value heads, each for `num_heads / num_kv_heads` neighbouring query
        heads.
      head_dim: size of a head; it need not be `dim / num_heads`.
      hidden_dim: width inside the gated MLP.
      vocab_size: rows of the token embedding and of the output layer, which is not tied to it.
      rope_base: base of the rotary frequencies.
      rotary_dtype: that these frequencies are rounded to.
      norm_eps: epsilon of every RMSNorm.
      residual_dtype: of embeddings and residual stream: "float32", or "compute", the compute type.
    """

    num_layers: Depth
    dim: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    hidden_dim: Size
    vocab_size: Size
    rope_base: Positive = 1e6
    rotary_dtype: Literal["float32", "bfloat16"] = "float32"
    norm_eps: Positive = 1e-6
    residual_dtype: Literal["float32", "compute"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim must be even, got {self.head_dim}")
        require(self.dim % 4 == 0, f"dim must be a multiple of 4, got {self.dim}")

    @classmethod
    def released(cls, name: str, vocab_size: int = QWEN3_VOCABULARY) -> Self:
        """A published dense Qwen3: "0.6b", "1.7b", "4b", "8b", "14b" or "32b".

        Raises:
          ConfigError: there is no such model.
        """
        sizes = QWEN3_SIZES.get(name.lower())
        if sizes is None:
            known = ", ".join(QWEN3_SIZES)
            raise ConfigError(f"unknown Qwen3 model {name!r}; one of: {known}")
        num_layers, dim, num_heads, hidden_dim = sizes
        return cls(
            num_layers=num_layers,
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=8,
            head_dim=128,
            hidden_dim=hidden_dim,
            vocab_size=vocab_size,
        )


@dataclass(frozen=True)
class ImageTokens(Config):
    """Ids of the added tokens before an image; conversion reads them from the tokenizer files.

    Attributes:
      vision_start: `<|vision_start|>`.
      first_resolution: `<|res_1|>`; `<|res_2|>` and so on follow in order.
      num_resolutions: their number, the longest side of an image in tokens.
      first_query: `<|query_1|>`; the P - 1 follow in order. Unused where P is 1.
    """

    vision_start: Natural
    first_resolution: Natural
    num_resolutions: Size
    first_query: Natural

    @classmethod
    def qwen3(cls) -> Self:
        """In the released models: the first ids that no token of Qwen3 has."""
        return cls(
            vision_start=151652, first_resolution=151669, num_resolutions=256, first_query=151925
        )

    @classmethod
    def of_vocabulary(cls, vocab_size: int, num_resolutions: int) -> Self:
        """Behind a byte-level BPE of `vocab_size` tokens, as `text.train_tokenizer` makes it.

        Four tokens of the template come first: those around a message and an image.
        """
        first = vocab_size + 4
        return cls(vocab_size + 2, first, num_resolutions, first + num_resolutions)


@dataclass(frozen=True)
class TextToImageConfig(Config):
    """Text-to-image BitDance: tokenizer, language model and head together.

    Attributes:
      tokenizer, text, head: the three parts.
      image_tokens: ids of the added tokens.
      tokens_per_step: P, a square number; p = sqrt(P) tokens along a patch's side.
    """

    tokenizer: TokenizerConfig
    text: Qwen3Config
    head: HeadConfig
    image_tokens: ImageTokens
    tokens_per_step: Annotated[int, Range(1, 4096)]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.patch_side**2 == self.tokens_per_step,
            f"tokens_per_step must be a square number, got {self.tokens_per_step}",
        )
        require(
            self.tokenizer.latents == "bits",
            "a text-to-image model reads and predicts bits; take a tokenizer without continuous "
            "latents",
            "tokenizer",
        )
        self.head.check_latents(self.tokenizer.bits, self.tokenizer.latents)
        ids = self.image_tokens
        last = max(
            ids.vision_start,
            ids.first_resolution + ids.num_resolutions - 1,
            ids.first_query + self.tokens_per_step - 2,
        )
        require(
            last < self.text.vocab_size,
            f"image_tokens reach id {last}, and the vocabulary has {self.text.vocab_size}",
        )

    @property
    def patch_side(self) -> int:
        return round(self.tokens_per_step**0.5)

    @property
    def size_multiple(self) -> int:
        """Heights and widths of images are multiples of this many pixels."""
        return self.tokenizer.downsampling * self.patch_side

    @property
    def largest_side(self) -> int:
        """Heights and widths of images have at most this many pixels."""
        return self.tokenizer.downsampling * self.image_tokens.num_resolutions

    @classmethod
    def released(cls, name: str) -> Self:
        """A released model: "14b_16x" or "14b_64x"."""
        parallel = {"14b_16x": 16, "14b_64x": 64}.get(name.lower().replace("-", "_"))
        if parallel is None:
            raise ConfigError(f"unknown text-to-image model {name!r}; one of: 14b_16x, 14b_64x")
        return cls.from_language_model(
            Qwen3Config.released("14b"), TokenizerConfig.d16c32(), parallel
        )

    @classmethod
    def from_language_model(
        cls,
        text: Qwen3Config,
        tokenizer: TokenizerConfig,
        tokens_per_step: int,
        image_tokens: ImageTokens | None = None,
        head: HeadConfig | None = None,
    ) -> Self:
        """The model that a language model becomes.

        The vocabulary grows if the added tokens need more rows than it has.

        Args:
          text: of the language model alone.
          tokenizer: of the images.
          tokens_per_step: P.
          image_tokens: ids of the added tokens; None: those after Qwen3's own.
          head: None: the released one at the language model's width.
        """
        ids = ImageTokens.qwen3() if image_tokens is None else image_tokens
        if head is None:
            head = FlowHeadConfig(
                width=text.dim, num_blocks=6, num_groups=2, head_dim=128, squash_output=True
            )
        return cls(
            tokenizer=tokenizer,
            text=_with_rows(text, ids, tokens_per_step),
            head=head,
            image_tokens=ids,
            tokens_per_step=tokens_per_step,
        )

    def with_tokens_per_step(self, tokens_per_step: int, image_tokens: ImageTokens) -> Self:
        """The model with more tokens a step, as 64x was made from 16x (paper 4.3).

        Args:
          tokens_per_step: P of the new model.
          image_tokens: of its prompt tokenizer, which has more queries.

        Raises:
          ConfigError: P is smaller than before, or 1 before, where the head is another one.
        """
        before = self.tokens_per_step
        require(
            tokens_per_step == before or 1 < before < tokens_per_step,
            f"tokens_per_step can grow from 4 or more, not change from {before} to"
            f" {tokens_per_step}",
            "tokens_per_step",
        )
        return dataclasses.replace(
            self,
            text=_with_rows(self.text, image_tokens, tokens_per_step),
            image_tokens=image_tokens,
            tokens_per_step=tokens_per_step,
        )


def _with_rows(text: Qwen3Config, ids: ImageTokens, tokens_per_step: int) -> Qwen3Config:
    """A language model whose vocabulary holds all queries; they have the last ids."""
    needed = ids.first_query + tokens_per_step - 1
    return dataclasses.replace(text, vocab_size=max(text.vocab_size, needed))
