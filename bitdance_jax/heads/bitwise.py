"""The bit-wise classification head (an ablation of paper 3.2): a binary classifier for each bit.

Bits are independent of each other given the transformer's state, those of one token too; what they
share is lost. That is what the binary diffusion head models.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.config import BitwiseHeadConfig
from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.heads.one_evaluation import OneEvaluation
from bitdance_jax.heads.protocols import Guide, Solver
from bitdance_jax.nn import linear
from bitdance_jax.nn.layers import transformer_init


class BitwiseHead(OneEvaluation, nn.Module):
    """Linear, silu, Linear to the log-odds of each bit (`protocols.Head`).

    Attributes:
      config: sizes.
      bits: K, bits of a token.
      tokens_per_step: P, tokens of a patch; each is predicted from its own state.
      scan, remat: ignored, there is one hidden layer.
      dtype: compute type; log-odds are float32.
    """

    config: BitwiseHeadConfig
    bits: int
    tokens_per_step: int
    scan: bool = False
    remat: str | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        width = self.config.width
        self.fc1 = linear.Dense(width, kernel_init=transformer_init, dtype=self.dtype)
        self.fc2 = linear.Dense(self.bits, kernel_init=transformer_init, dtype=jnp.float32)

    def log_odds(self, states: Float[Array, "*B P C"]) -> Float[Array, "*B P K"]:
        """log p(bit = 1) / p(bit = -1)."""
        hidden = nn.silu(self.fc1(states))
        return self.fc2(constrain(hidden, "batch", *[None] * (hidden.ndim - 2), "hidden"))

    def loss(
        self, states: Float[Array, "B N P C"], bits: Float[Array, "B N P K"], noise: tuple[()]
    ) -> Float[Array, "B N P"]:
        """Binary cross-entropy in nats, a mean over the bits of a token."""
        losses = optax.sigmoid_binary_cross_entropy(self.log_odds(states), (bits + 1) / 2)
        return jnp.mean(losses, axis=-1)

    def sample(
        self,
        states: Float[Array, "R P C"],
        noise: Float[Array, "S R P K"],
        prepared: None,
        *,
        solver: Solver,
        guide: Guide | None,
    ) -> Float[Array, "R P K"]:
        """Log-odds plus logistic noise, which is positive with the probability of the bit 1.

        Guidance acts on the log-odds: l_u + s (l_c - l_u).
        """
        log_odds = self.log_odds(states)
        if guide is not None:
            log_odds = guide(log_odds, guide.scales[0])
        return log_odds + logistic(noise[0])

    @nn.nowrap
    def sampling_bytes(self, rows: int, num_evaluations: int) -> float:
        return 4.0 * rows * self.tokens_per_step * (self.config.width + 4 * self.bits)


def logistic(normal: Float[Array, "*B"]) -> Any:
    """Standard normal numbers to logistic ones: the log-odds of their cumulative probability.

    l + logistic noise is positive with probability sigmoid(l).
    """
    norm = jax.scipy.stats.norm
    return norm.logcdf(normal) - norm.logcdf(-normal)
