"""Low-rank adaptation of linear layers."""

from dataclasses import dataclass
from typing import Annotated

from bitdance_jax.config.plain import Config, PathName, Positive, Range, require


@dataclass(frozen=True)
class LoraConfig(Config):
    """LoRA (arXiv 2106.09685): layers compute x W + alpha / rank * (x A) B, of which only A and B
    train.

    Attributes:
      rank: columns of A, rows of B; 0: there are no adapters.
      alpha: of the scale alpha / rank.
      targets: the adapted linear layers, by their names in the released files or the last parts of
        them, as PEFT's target_modules: "q_proj", "mlp.down_proj", "projector.fc1",
        "vision_head.net.cond_embed".
      init: folder of an adapter of this rank and these layers, or of a run that trained one, which
        training starts from; None: adapters that change nothing yet.
    """

    rank: Annotated[int, Range(0, 2**16)] = 0
    alpha: Positive = 16.0
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    init: PathName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.targets), "targets is empty; name the layers to adapt", "targets")
        require(
            self.init is None or self.rank > 0,
            "init needs a rank, that of the adapter in it; set lora.rank",
            "init",
        )

    @property
    def scale(self) -> float:
        """Of (x A) B."""
        return self.alpha / self.rank
