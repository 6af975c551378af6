"""The token classification head (an ablation of paper 3.2): a softmax over all codes of a token.

Its last layer has 2^K outputs for tokens of K bits, so it fits small K alone, or bits in groups.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.config import TokenClassificationHeadConfig
from bitdance_jax.distributed.constraints import constrain, rows_per_device
from bitdance_jax.heads.bitwise import logistic
from bitdance_jax.heads.one_evaluation import OneEvaluation
from bitdance_jax.heads.protocols import Guide, Solver
from bitdance_jax.nn import linear
from bitdance_jax.nn.layers import transformer_init
from bitdance_jax.tokenizer import lfq


LOGITS_AT_ONCE = 2**26
"""Logits that the loss computes at a time on a device (256 MiB). They are computed again in the
backward pass, so that they never lie in memory for the entire batch."""


class TokenClassificationHead(OneEvaluation, nn.Module):
    """Linear, silu, Linear to the logits of all codes of each group of bits (`protocols.Head`).

    Attributes:
      config: sizes; V = 2^(K / G) codes of each of G groups.
      bits: K, bits of a token.
      tokens_per_step: P, tokens of a patch; each is predicted from its own state.
      scan, remat: ignored, there is one hidden layer.
      dtype: compute type; logits are float32.
    """

    config: TokenClassificationHeadConfig
    bits: int
    tokens_per_step: int
    scan: bool = False
    remat: str | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        width = self.config.width
        self.fc1 = linear.Dense(width, kernel_init=transformer_init, dtype=self.dtype)
        self.code_logits = linear.Dense(
            self._num_logits, kernel_init=transformer_init, dtype=self.dtype
        )

    @property
    def _num_logits(self) -> int:
        groups = self.config.groups
        return int(groups * 2 ** (self.bits // groups))

    def logits(self, states: Float[Array, "*B P C"]) -> Float[Array, "*B P G V"]:
        """Of the codes by their index, `lfq.codes_to_indices`."""
        logits = self.code_logits(nn.silu(self.fc1(states))).astype(jnp.float32)
        logits = constrain(logits, "batch", *[None] * (logits.ndim - 2), "hidden")
        return rearrange(logits, "... p (g v) -> ... p g v", g=self.config.groups)

    def loss(
        self, states: Float[Array, "B N P C"], bits: Float[Array, "B N P K"], noise: tuple[()]
    ) -> Float[Array, "B N P"]:
        """Cross-entropy in nats, divided by the number of bits: comparable to other heads'."""
        indices = lfq.codes_to_indices(bits, self.config.groups)
        parts = self._parts(*states.shape[:2])

        def of_part(head: TokenClassificationHead, carry: None, part: list[Array]) -> tuple:
            losses = optax.softmax_cross_entropy_with_integer_labels(head.logits(part[0]), part[1])
            return carry, jnp.sum(losses, axis=-1) / head.bits

        def split(x: Array) -> Array:
            return rearrange(x, "b (parts n) ... -> parts b n ...", parts=parts)

        mapped = nn.scan(
            nn.remat(of_part, prevent_cse=False),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        _, losses = mapped(self, None, [split(states), split(indices)])
        return rearrange(losses, "parts b n p -> b (parts n) p")

    def sample(
        self,
        states: Float[Array, "R P C"],
        noise: Float[Array, "S R P K"],
        prepared: None,
        *,
        solver: Solver,
        guide: Guide | None,
    ) -> Float[Array, "R P K"]:
        """Values whose signs are codes with the probabilities of the softmax.

        Guidance acts on the logits: l_u + s (l_c - l_u).
        """
        logits = self.logits(states)
        if guide is not None:
            guided = guide(rearrange(logits, "r p g v -> r p (g v)"), guide.scales[0])
            logits = guided.reshape(logits.shape)
        noise = rearrange(logistic(noise[0]), "r p (g k) -> r p g k", g=self.config.groups)
        return rearrange(sample_codes(logits, noise), "r p g k -> r p (g k)")

    @nn.nowrap
    def sampling_bytes(self, rows: int, num_evaluations: int) -> float:
        """Of the logits: as computed, guided, and as probabilities of halves."""
        return 3 * 4.0 * rows * self.tokens_per_step * self._num_logits

    def _parts(self, batch: int, num_patches: int) -> int:
        """Parts of the patches whose logits are computed one after the other."""
        patch = rows_per_device(batch) * self.tokens_per_step * self._num_logits
        divisors = (n for n in range(1, num_patches + 1) if num_patches % n == 0)
        fitting = (n for n in divisors if patch * (num_patches // n) <= LOGITS_AT_ONCE)
        return next(fitting, num_patches)


def sample_codes(logits: Float[Array, "*B V"], noise: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """A code of each softmax, bit by bit: each from its probability given the bits before it.

    So K random numbers are enough for one of 2^K codes, whatever their probabilities.

    Args:
      logits: of the codes by their index (`lfq.codes_to_indices`), V = 2^K.
      noise: logistic.

    Returns:
      Log-odds of every bit given those before it, plus its noise; the last bit is the first.
    """
    values = []
    for bit in reversed(range(noise.shape[-1])):  # the most significant one first
        zero, one = jnp.split(logits, 2, axis=-1)
        log_odds = jax.nn.logsumexp(one, axis=-1) - jax.nn.logsumexp(zero, axis=-1)
        values.append(log_odds + noise[..., bit])
        logits = jnp.where(values[-1][..., None] > 0, one, zero)
    return jnp.stack(values[::-1], axis=-1)
