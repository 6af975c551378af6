"""A prediction head of your own: it predicts the mean of each bit, by its squared error.

    bitdance train examples/head.py                       # on the bits of the embedded emoji
    bitdance train examples/head.py --run.steps 20        # a trial

The squared error of a mean is least at the true one (the Brier score), as the cross-entropy of the
package's bit-wise head is. A patch is sampled in one evaluation, every bit by itself, so the
solver's settings are ignored. Inside the package, the config belongs beside `FlowHeadConfig`, and
the entry of HEADS into `bitdance_jax/heads/make.py`; no other file has to know the head.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.config import (
    ClassConditionalConfig,
    HeadConfig,
    RunConfig,
    TokenizerConfig,
    TransformerConfig,
)
from bitdance_jax.config.plain import Size
from bitdance_jax.data.config import DataConfig
from bitdance_jax.heads.make import HEADS
from bitdance_jax.heads.one_evaluation import OneEvaluation
from bitdance_jax.heads.protocols import Guide, Solver
from bitdance_jax.nn import linear
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining


@dataclass(frozen=True)
class BrierHeadConfig(HeadConfig, kind="brier"):
    """The head of means.

    Attributes:
      width: of its hidden layer.
    """

    width: Size


class BrierHead(OneEvaluation, nn.Module):
    """Linear, silu, Linear, tanh to the mean of each bit (`heads.protocols.Head`).

    The layers have names that the sharding rules know.
    """

    config: BrierHeadConfig
    bits: int
    tokens_per_step: int
    scan: bool = False
    remat: str | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.fc1 = linear.Dense(self.config.width, dtype=self.dtype)
        self.fc2 = linear.Dense(self.bits, dtype=jnp.float32)

    def means(self, states: Float[Array, "*B P C"]) -> Float[Array, "*B P K"]:
        return nn.tanh(self.fc2(nn.silu(self.fc1(states))))

    def loss(
        self, states: Float[Array, "B N P C"], bits: Float[Array, "B N P K"], noise: tuple[()]
    ) -> Float[Array, "B N P"]:
        return jnp.mean(jnp.square(self.means(states) - bits), axis=-1)

    def sample(
        self,
        states: Float[Array, "R P C"],
        noise: Float[Array, "S R P K"],
        prepared: Any,
        *,
        solver: Solver,
        guide: Guide | None,
    ) -> Float[Array, "R P K"]:
        """Means plus uniform noise in (-1, 1): positive with probability (1 + mean) / 2."""
        means = self.means(states)
        if guide is not None:
            means = guide(means, guide.scales[0])
        return means + 2 * jax.scipy.stats.norm.cdf(noise[0]) - 1

    @nn.nowrap
    def sampling_bytes(self, rows: int, num_evaluations: int) -> float:
        return 0.0


HEADS[BrierHeadConfig] = BrierHead


def get_config() -> ClassConditionalTraining:
    """A small model on the embedded emoji; `bitdance train` calls this."""
    return ClassConditionalTraining(
        run=RunConfig(workdir="runs/brier", steps=1000, log_every=20, preview_every=200),
        model=ClassConditionalConfig(
            tokenizer=TokenizerConfig(
                bits=32, ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1, num_codebooks=4
            ),
            transformer=TransformerConfig(num_layers=4, dim=128, num_heads=4),
            head=BrierHeadConfig(width=256),
            num_classes=97,
            image_size=64,
            tokens_per_step=4,
            class_tokens=4,
        ),
        tokenizer="emoji",
        data=DataConfig(batch_size=32, cache_latents=True),
    )
