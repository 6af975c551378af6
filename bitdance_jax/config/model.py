"""Sizes of the tokenizer and of the class-conditional models; the released ones as named presets.

Sizes are from the paper (arXiv 2602.14041, tables of sections 3 and 4) and the release.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from bitdance_jax.config.head import FlowHeadConfig, HeadConfig, Latents
from bitdance_jax.config.plain import Config, Depth, Positive, Range, Share, Size, require
from bitdance_jax.errors import ConfigError


MAX_LEVELS = 16
"""Of a tokenizer; with more, one token would be larger than any image."""

MAX_SEQUENCE = 2**15
"""Tokens of an image and its prefix; the mask has an entry for every pair."""

MAX_TABLE = 2**28
"""Numbers in the table of position embeddings."""


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """The CNN tokenizer (paper 3.1). Fields after `bits` are named as in the release's `ddconfig`.

    Attributes:
      bits: bits of one token (`z_channels`), or its real numbers if `latents` is "continuous".
      ch: width of the finest level; a multiple of 32, the number of GroupNorm groups.
      ch_mult: width multiplier of each level, finest first; levels but the last halve the image.
      num_res_blocks: residual blocks of each level and of the middle.
      image_channels: channels of an image.
      decoder: "plain", or "gan": the decoder also takes normal noise of the code's shape.
      num_codebooks: groups the bits are split into for the entropy terms; it must divide `bits`.
      attention_blocks: transformer blocks of the encoder and of the decoder, as UniWeTok has them
        (arXiv 2602.14178); 0 for the CNN tokenizers.
      attention_heads: of each of those blocks.
      latents: "bits", or "continuous": the autoencoder with a Kullback-Leibler term of latent
        diffusion (`tokenizer.kl`), whose levels have one residual block more in the decoder. It
        uses neither `num_codebooks` nor `decoder`.
      latent_scale: continuous latents are the means of the encoder times this, so that their
        standard deviation is about 1.
      coarsest_attention: attention after each residual block of the coarsest level of a continuous
        tokenizer: in "none", "encoder" (MAR's), or "both" (latent diffusion's kl-f16).
    """

    bits: Size = 32
    ch: Size = 256
    ch_mult: tuple[Size, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: Annotated[int, Range(1, 32)] = 4
    image_channels: Size = 3
    decoder: Literal["plain", "gan"] = "plain"
    num_codebooks: Size = 4
    attention_blocks: Annotated[int, Range(0, 32)] = 0
    attention_heads: Size = 16
    latents: Latents = "bits"
    latent_scale: Positive = 1.0
    coarsest_attention: Literal["none", "encoder", "both"] = "encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ch % 32 == 0, f"ch must be a multiple of 32 (GroupNorm groups), got {self.ch}")
        require(
            0 < len(self.ch_mult) <= MAX_LEVELS,
            f"ch_mult must have 1 to {MAX_LEVELS} levels, got {len(self.ch_mult)}",
        )
        require(
            self.bits % self.num_codebooks == 0,
            f"num_codebooks must divide bits, got {self.num_codebooks} and {self.bits}",
        )
        width = self.ch * self.ch_mult[-1]
        require(
            not self.attention_blocks or width % (4 * self.attention_heads) == 0,
            f"the width {width} of the coarsest level must be a multiple of 4 * attention_heads, "
            f"got {self.attention_heads} heads",
        )
        require(
            not self.attention_blocks or self.decoder == "gan",
            "a tokenizer with attention_blocks has a GAN decoder; set decoder gan",
        )
        require(
            self.latents == "bits" or (self.decoder == "plain" and not self.attention_blocks),
            "a tokenizer with continuous latents has a plain decoder and attention of its own; set "
            "decoder plain and attention_blocks 0",
        )

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a token."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def has_attention(self) -> bool:
        """Whether encoder and decoder need all tokens of an image at once."""
        return self.attention_blocks > 0 or self.latents == "continuous"

    @property
    def packed_bytes(self) -> int:
        """Bytes of a token in files: 8 bits each, or float16 numbers."""
        return -(-self.bits // 8) if self.latents == "bits" else 2 * self.bits

    @classmethod
    def d16c32(cls) -> Self:
        """The released `ae_d16c32` (460M): 32 bits for 16x16 pixels."""
        return cls(bits=32, ch=256, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=4)

    @classmethod
    def d32c128(cls) -> Self:
        """The released `ae_d32c128` (421M): 128 bits for 32x32 pixels, GAN decoder."""
        return cls(
            bits=128,
            ch=128,
            ch_mult=(1, 1, 2, 2, 4, 8),
            num_res_blocks=4,
            decoder="gan",
            num_codebooks=16,
        )

    @classmethod
    def d32c256(cls) -> Self:
        """256 bits for 32x32 pixels, GAN decoder; widths are those of `ae_d32c128`.

        The widths of the released `ae_d32c256` are in its own config file, from which it converts.
        """
        return dataclasses.replace(cls.d32c128(), bits=256, num_codebooks=32)

    @classmethod
    def uniwetok(cls) -> Self:
        """UniWeTok (arXiv 2602.14178): 128 bits for 32x32 pixels, attention at the last level."""
        return dataclasses.replace(cls.d32c128(), attention_blocks=2, attention_heads=16)

    @classmethod
    def kl16(cls) -> Self:
        """MAR's `kl16` (arXiv 2406.11838): 16 real numbers for 16x16 pixels."""
        return cls(
            bits=16,
            ch=128,
            ch_mult=(1, 1, 2, 2, 4),
            num_res_blocks=2,
            num_codebooks=1,
            latents="continuous",
            latent_scale=0.2325,
        )


def swiglu_width(dim: int) -> int:
    """Width inside the SwiGLU of a transformer: int(8 dim / 3) rounded up to a multiple of 256."""
    return -(-int(2 * 4 * dim / 3) // 256) * 256


@dataclass(frozen=True)
class TransformerConfig(Config):
    """The block-causal transformer of the class-conditional models (paper 3.3, sizes in 4.2).

    Attributes:
      num_layers: pre-norm blocks.
      dim: width.
      num_heads: attention heads; `dim / num_heads` must be a multiple of 4 (2-D rotary pairs).
      rope_base: base of the rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      residual_dtype: of embeddings and residual stream: "float32", or "compute", the compute type.
    """

    num_layers: Depth
    dim: Size
    num_heads: Size
    rope_base: Positive = 10000.0
    norm_eps: Positive = 1e-6
    residual_dtype: Literal["float32", "compute"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.dim % (4 * self.num_heads) == 0,
            f"dim must be a multiple of 4 * num_heads, got {self.dim} and {self.num_heads} heads",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width inside the SwiGLU."""
        return swiglu_width(self.dim)


@dataclass(frozen=True)
class ClassConditionalConfig(Config):
    """Class-conditional BitDance (paper 3 and 4.2): tokenizer, transformer and head together.

    Attributes:
      tokenizer, transformer, head: the three parts.
      num_classes: labels are 0 ... num_classes - 1; `num_classes` itself is the unconditional one.
      image_size: side of the square images, in pixels.
      tokens_per_step: P, a square number; p = sqrt(P) tokens along a patch's side.
      class_tokens: prefix tokens made from one class embedding row.
      order: "patch" raster, or "token" raster split into runs of P (Table 14).
      mask: "block_causal", or "causal" (the ablation without block visibility).
      bit_flip_rate: an input bit flips with probability u * rate, u uniform for each bit;
        continuous latents stay as they are.
      label_drop_rate: share of the labels replaced by the unconditional one.
      head_repeats: fresh times and noises for each target (`diff_batch_mul`).
    """

    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    head: HeadConfig
    num_classes: Size
    image_size: Size
    tokens_per_step: Size
    class_tokens: Size = 64
    order: Literal["patch", "token"] = "patch"
    mask: Literal["block_causal", "causal"] = "block_causal"
    bit_flip_rate: Share = 0.1
    label_drop_rate: Share = 0.1
    head_repeats: Size = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        down = self.tokenizer.downsampling
        require(
            self.patch_side**2 == self.tokens_per_step,
            f"tokens_per_step must be a square number, got {self.tokens_per_step}",
        )
        require(
            self.image_size % (down * self.patch_side) == 0,
            f"image_size must be a multiple of {down * self.patch_side} "
            f"(downsampling {down} x patch side {self.patch_side}), "
            f"got {self.image_size}",
        )
        self.head.check_latents(self.tokenizer.bits, self.tokenizer.latents)
        length = self.class_tokens + self.num_tokens
        require(
            length <= MAX_SEQUENCE,
            f"image_size and class_tokens make a sequence of {length} tokens, "
            f"and at most {MAX_SEQUENCE} work",
        )
        require(
            length * self.transformer.dim <= MAX_TABLE,
            f"a sequence of {length} tokens is too long for dim {self.transformer.dim}",
        )

    @property
    def patch_side(self) -> int:
        return round(self.tokens_per_step**0.5)

    @property
    def grid(self) -> int:
        """Tokens along one side of an image."""
        return self.image_size // self.tokenizer.downsampling

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def num_steps(self) -> int:
        """Autoregressive steps of one image."""
        return self.num_tokens // self.tokens_per_step

    @classmethod
    def imagenet(cls, name: str) -> Self:
        """An ImageNet 256px model: "b_1x", "b_4x", "b_16x", "l_1x", ..., "h_16x" (paper 4.2).

        Published: B-1x, B-4x, B-16x, L-1x, H-1x.
        """
        sizes = {"b": (24, 768, 12, 6, 2), "l": (32, 1024, 16, 8, 2), "h": (40, 1280, 20, 12, 3)}
        size, _, parallel = name.lower().replace("-", "_").partition("_")
        if size not in sizes or parallel not in ("1x", "4x", "16x"):
            names = ", ".join(f"{s}_{p}" for s in sizes for p in ("1x", "4x", "16x"))
            raise ConfigError(f"unknown ImageNet model {name!r}; one of: {names}")
        layers, dim, heads, blocks, groups = sizes[size]
        return cls(
            tokenizer=TokenizerConfig.d16c32(),
            transformer=TransformerConfig(num_layers=layers, dim=dim, num_heads=heads),
            head=FlowHeadConfig(width=dim, num_blocks=blocks, num_groups=groups),
            num_classes=1000,
            image_size=256,
            tokens_per_step=int(parallel[:-1]),
            bit_flip_rate=0.1 if size == "b" else 0.05,
        )
