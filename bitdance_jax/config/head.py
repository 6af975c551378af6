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


@dataclass(frozen=True)
class HeadConfig(Tagged):
    """Base of the heads' configs; `heads.make` maps each to its module.

    A subclass gives its name in files: `class MyHeadConfig(HeadConfig, kind="mine")`.
    """

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
