"""Sizes and hyper-parameters of the prediction heads (paper 3.2)."""

from dataclasses import dataclass
from typing import Literal

from bitdance_jax.config.plain import (
    Depth,
    NotNegative,
    Positive,
    Size,
    Tagged,
    require,
)


Latents = Literal["bits", "continuous"]
"""What the tokens of a tokenizer consist of: bits in {-1, 1}, or real numbers."""

MAX_LOGIT_BITS = 20
"""Bits of a group that one softmax can have: 2^20 logits."""


@dataclass(frozen=True)
class HeadConfig(Tagged):
    """Base of the heads' configs; `heads.make` maps each to its module.

    A subclass gives its name in files: `class MyHeadConfig(HeadConfig, kind="mine")`.
    """

    def check_latents(self, bits: int, latents: Latents) -> None:
        """Checks that the head can predict tokens of `bits` bits, or real numbers.

        Raises:
          ConfigError: it cannot. Heads predict bits alone unless they say more.
        """
        require(
            latents == "bits",
            f"head of the kind {self.kind} predicts bits, and the tokenizer's latents are "
            "continuous; take the binary diffusion head, which predicts real numbers too",
            "head",
        )

    @property
    def time_shift(self) -> float | None:
        """For `sampling.solvers`; None: one evaluation of the head gives a patch."""
        return None


@dataclass(frozen=True)
class FlowHeadConfig(HeadConfig):
    """The binary diffusion head (paper 3.2): a DiT over the tokens of one patch.

    It is an MLP if a patch is one token. In files it has no `kind`: it was the first head.

    Attributes:
      width: width of the blocks.
      num_blocks: blocks in all groups together.
      num_groups: adaLN linear layers, each shared by `num_blocks / num_groups` consecutive blocks.
      head_dim: size of an attention head (unused if a patch is one token).
      use_swiglu: SwiGLU inside the blocks, or Linear, silu, Linear.
      squash_output: map the output through 2 sigmoid(o) - 1 (the text-to-image heads).
      time_distribution: of the training times: "logit_normal" or "uniform".
      time_mean, time_std: t = sigmoid(time_std n + time_mean) with standard normal n.
      time_shift: s of t <- (1/s) / (1/s + 1/t - 1), in training and sampling.
    """

    width: Size
    num_blocks: Depth
    num_groups: Depth
    head_dim: Size = 64
    use_swiglu: bool = True
    squash_output: bool = False
    time_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    time_mean: float = -0.8
    time_std: NotNegative = 0.8
    time_shift: Positive = 1.0

    def check_latents(self, bits: int, latents: Latents) -> None:
        require(
            latents == "bits" or not self.squash_output,
            "head.squash_output limits the output to (-1, 1), and continuous latents have no "
            "limits; set head.squash_output False",
            "head.squash_output",
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_blocks % self.num_groups == 0,
            f"num_groups must divide num_blocks, got {self.num_groups} and {self.num_blocks}",
            "num_groups",
        )
        require(
            self.width % self.head_dim == 0,
            f"head_dim must divide width, got {self.head_dim} and {self.width}",
            "head_dim",
        )
        require(self.width % 2 == 0, f"width must be even, got {self.width}", "width")


@dataclass(frozen=True)
class BitwiseHeadConfig(HeadConfig, kind="bitwise"):
    """The bit-wise classification head: a binary classifier for each bit of a token.

    The bits of a token are independent of each other given the transformer's state.

    Attributes:
      width: of the hidden layer.
    """

    width: Size


@dataclass(frozen=True)
class TokenClassificationHeadConfig(HeadConfig, kind="token_classification"):
    """The token classification head: a softmax over all codes of a token.

    Attributes:
      width: of the hidden layer.
      groups: parts of equal size that the bits of a token are split into, each with a softmax of
        its own, and independent of the others given the transformer's state. 1: one softmax over
        all 2^K codes.
    """

    width: Size
    groups: Size = 1

    def check_latents(self, bits: int, latents: Latents) -> None:
        super().check_latents(bits, latents)
        require(
            bits % self.groups == 0,
            f"head.groups must divide the tokenizer's bits, got {self.groups} and {bits}",
            "head.groups",
        )
        size = bits // self.groups
        logits = 4.0 * 2.0 ** min(size, 900) / 2**30
        require(
            size <= MAX_LOGIT_BITS,
            f"head of the kind token_classification has 2^{size} logits for tokens of {bits} bits: "
            f"{_gib(logits)} of logits for each token, and {_gib(self.width * logits)} of weights; "
            f"at most 2^{MAX_LOGIT_BITS} fit: split the bits by head.groups, or take the bitwise "
            "or the binary diffusion head",
            "head",
        )


def _gib(count: float) -> str:
    return f"{count:,.0f} GiB" if count < 1e6 else f"{count:.0e} GiB"
