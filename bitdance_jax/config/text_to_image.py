"""Sizes of the text-to-image models (paper 4.3); the released ones as named presets."""

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
    def qwen3_14b(cls, vocab_size: int) -> Self:
        """Qwen3-14B."""
        return cls(
            num_layers=40,
            dim=5120,
            num_heads=40,
            num_kv_heads=8,
            head_dim=128,
            hidden_dim=17408,
            vocab_size=vocab_size,
            rope_base=1e6,
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

    @classmethod
    def released(cls, name: str) -> Self:
        """A released model: "14b_16x" or "14b_64x"."""
        parallel = {"14b_16x": 16, "14b_64x": 64}.get(name.lower().replace("-", "_"))
        if parallel is None:
            raise ConfigError(f"unknown text-to-image model {name!r}; one of: 14b_16x, 14b_64x")
        ids = ImageTokens(
            vision_start=151652, first_resolution=151669, num_resolutions=256, first_query=151925
        )
        return cls(
            tokenizer=TokenizerConfig.d16c32(),
            text=Qwen3Config.qwen3_14b(vocab_size=ids.first_query + parallel - 1),
            head=FlowHeadConfig(
                width=5120, num_blocks=6, num_groups=2, head_dim=128, squash_output=True
            ),
            image_tokens=ids,
            tokens_per_step=parallel,
        )
