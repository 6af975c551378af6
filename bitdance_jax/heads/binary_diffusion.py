"""The binary diffusion head f(x_t, t, z) (paper 3.2): predicts all clean bits of one patch at once.

As under PyTorch's autocast, linear layers return the compute type, and so does a residual stream
that starts with one and adds their gated results only. Norms and modulation are float32 up to the
next layer.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from bitdance_jax.config import FlowHeadConfig
from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.heads import flow_matching
from bitdance_jax.heads.dit import (
    HeadGroup,
    TimeEmbedding,
    gather_tokens,
    layer_norm,
    modulate,
    shard_tokens,
)
from bitdance_jax.heads.flow_matching import FlowNoise
from bitdance_jax.heads.protocols import Guide, Solver
from bitdance_jax.nn import linear, quantize
from bitdance_jax.nn.layers import FusedDense, head_init
from bitdance_jax.nn.stack import stacked


class FlowHead(nn.Module):
    """Predicts clean bits from noisy ones (`protocols.Head`).

    Attributes:
      config: sizes.
      bits: K, bits of a token.
      tokens_per_step: P, tokens of a patch.
      scan: parameters stacked and blocks scanned (training), or unrolled.
      remat: what the backward pass stores (`nn.stack.remat_policy`).
      dtype: compute type; the prediction is float32.
    """

    config: FlowHeadConfig
    bits: int
    tokens_per_step: int
    scan: bool = False
    remat: str | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.time_embed = TimeEmbedding(config.width, self.dtype)
        self.cond_embed = linear.Dense(config.width, kernel_init=head_init, dtype=self.dtype)
        self.input_proj = linear.Dense(config.width, kernel_init=head_init, dtype=self.dtype)
        group: tuple[Any, ...] = (config, self.tokens_per_step, self.scan, self.remat, self.dtype)
        if self.scan:
            self.groups: Any = stacked(HeadGroup, config.num_groups, None)(*group)
        else:
            self.groups = [HeadGroup(*group) for _ in range(config.num_groups)]
        self.final_norm = layer_norm(None, self.dtype, affine=False)
        self.final_ada_ln = FusedDense(2, config.width, True, nn.initializers.zeros, self.dtype)
        self.final_linear = linear.Dense(
            self.bits, kernel_init=nn.initializers.zeros, dtype=jnp.float32
        )

    def __call__(
        self, x_t: Float[Array, "B P K"], t: Float[Array, "B"], states: Float[Array, "B P C"]
    ) -> Float[Array, "B P K"]:
        """The predicted clean bits, float32, at one time for each patch."""
        return self._denoise(x_t, self.time_embed(t)[:, None], self.embed_condition(states))

    @nn.nowrap
    def training_noise(self, keys: Key[Array, "2"], repeats: int, num_patches: int) -> FlowNoise:
        """Random numbers of one image; see `protocols.Head`."""
        time_key, bits_key = keys
        shape = (repeats, num_patches)
        return FlowNoise(
            jax.random.normal(time_key, shape),
            jax.random.normal(bits_key, (*shape, self.tokens_per_step, self.bits)),
        )

    def loss(
        self, states: Float[Array, "B N P C"], bits: Float[Array, "B N P K"], noise: FlowNoise
    ) -> Float[Array, "B N P"]:
        """Velocity loss of each token, a mean over its bits and M times (paper 3.2, 3.3)."""
        clean = bits[:, None]
        t = flow_matching.training_times(noise.time, self.config)
        x_t = flow_matching.interpolate(clean, noise.bits, t)
        predicted = self.predict_all(x_t, t, states)
        return jnp.mean(jnp.mean(flow_matching.velocity_loss(predicted, clean, t), axis=-1), axis=1)

    def predict_all(
        self,
        x_t: Float[Array, "B M N P K"],
        t: Float[Array, "B M N"],
        states: Float[Array, "B N P C"],
    ) -> Float[Array, "B M N P K"]:
        """The predicted clean bits of M noisy versions of every patch."""
        condition = repeat(self.embed_condition(states), "b n p d -> (b m n) p d", m=x_t.shape[1])
        condition = constrain(condition, "batch", None, None)
        time = rearrange(self.time_embed(t), "b m n d -> (b m n) 1 d")
        time = constrain(time, "batch", None, None)
        x_t_rows = rearrange(x_t, "b m n p k -> (b m n) p k")
        return self._denoise(x_t_rows, time, condition).reshape(x_t.shape)

    def prepare(self, solver: Solver) -> Float[Array, "E D"]:
        """The embedded times of the evaluations, which all patches share."""
        return self.time_embed(solver.times())

    def sample(
        self,
        states: Float[Array, "R P C"],
        noise: Float[Array, "S R P K"],
        prepared: Float[Array, "E D"],
        *,
        solver: Solver,
        guide: Guide | None,
    ) -> Float[Array, "R P K"]:
        """Values of one patch; see `protocols.PatchHead`. The groups are unrolled."""
        patch = self.prepare_patch(states, prepared)
        velocity = flow_matching.guided_velocity(
            lambda x_t, evaluation: self.predict(x_t, patch, evaluation), solver.times(), guide
        )
        return solver.solve(velocity, noise)

    @nn.nowrap
    def sampling_bytes(self, rows: int, num_evaluations: int) -> float:
        """Of the modulation, as it is computed and split into vectors."""
        width = self.config.width
        tokens = rows * self.tokens_per_step
        at_once = modulated_at_once(tokens, num_evaluations, width)
        evaluations = num_evaluations if at_once else 1
        vectors = 6 * self.config.num_groups + 2
        return 2.0 * evaluations * tokens * vectors * width * jnp.dtype(self.dtype).itemsize

    def embed_condition(self, states: Float[Array, "*B P C"]) -> Float[Array, "*B P D"]:
        """The transformer's states at patches to vectors of the head's width."""
        condition = self.cond_embed(states)
        # Gathered before they are added to the times, which are many.
        return constrain(condition, "batch", *[None] * (condition.ndim - 1))

    def prepare_patch(
        self, states: Float[Array, "R P C"], times: Float[Array, "E D"]
    ) -> "PreparedPatch":
        """What `predict` needs beside the noisy bits of one patch."""
        condition = self.embed_condition(states)
        # Whoever stores weights in int4 is short of memory.
        if not quantize.is_int4(self.variables) and modulated_at_once(
            states.shape[0] * states.shape[1], *times.shape
        ):
            return self._modulation(times[:, None, None], condition)
        return TimesAndCondition(times, condition)

    def predict(
        self, x_t: Float[Array, "R P K"], patch: "PreparedPatch", evaluation: Int[Array, ""] | int
    ) -> Float[Array, "R P K"]:
        """The clean bits, float32, predicted from noisy ones at one evaluation, 0 ... E - 1."""

        def at(array: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(array, evaluation, keepdims=False)

        if isinstance(patch, TimesAndCondition):
            return self._denoise(x_t, at(patch.times), patch.condition)
        return self._predict(x_t, jax.tree.map(at, patch))

    def _denoise(
        self,
        x_t: Float[Array, "B P K"],
        time: Float[Array, "*b D"],
        condition: Float[Array, "B P D"],
    ) -> Float[Array, "B P K"]:
        """Clean bits from embedded times and conditions; the groups may be scanned."""
        if not self.scan:
            return self._predict(x_t, self._modulation(time, condition))
        style = self._style(time, condition)
        x, _ = self.groups(self._embed(x_t), style)
        return self._clean_bits(x, self.final_ada_ln(style))

    def _modulation(
        self, time: Float[Array, "*b D"], condition: Float[Array, "B P D"]
    ) -> "Modulation":
        """Of the blocks and the last layer, unrolled groups.

        Args:
          time: embedded times: [D], [B, 1, D], or [E, 1, 1, D] for E evaluations at once.
          condition: `embed_condition` of the states.
        """
        style = self._style(time, condition)
        groups = [group.modulation(style) for group in self.groups]
        return groups, [shard_tokens(vector) for vector in self.final_ada_ln(style)]

    def _predict(
        self, x_t: Float[Array, "B P K"], modulation: "Modulation"
    ) -> Float[Array, "B P K"]:
        groups, last = modulation
        x = self._embed(x_t)
        for group, vectors in zip(self.groups, groups, strict=True):
            x = group.run(x, vectors)
        return self._clean_bits(x, last)

    def _style(
        self, time: Float[Array, "*b D"], condition: Float[Array, "B P D"]
    ) -> Float[Array, "*E T D"]:
        # The sharding is fixed: otherwise the compiler would shard the tokens as the kernels.
        style = rearrange(nn.silu(time + condition), "... b p d -> ... (b p) d")
        return gather_tokens(style)

    def _embed(self, x_t: Float[Array, "B P K"]) -> Float[Array, "T D"]:
        tokens = gather_tokens(rearrange(x_t, "b p k -> (b p) k"))
        return shard_tokens(self.input_proj(shard_tokens(tokens)))

    def _clean_bits(
        self, x: Float[Array, "T D"], modulation: list[Float[Array, "T D"]]
    ) -> Float[Array, "B P K"]:
        out = self.final_linear(modulate(self.final_norm(x), *modulation))
        out = rearrange(gather_tokens(out), "(b p) k -> b p k", p=self.tokens_per_step)
        return 2 * nn.sigmoid(out) - 1 if self.config.squash_output else out


Modulation = tuple[list[list[Float[Array, "*E T D"]]], list[Float[Array, "*E T D"]]]
"""(vectors of each group, vectors of the last layer)."""


class TimesAndCondition(NamedTuple):
    """Embedded times of all evaluations, and `embed_condition` of a patch's states."""

    times: Float[Array, "E D"]
    condition: Float[Array, "R P D"]


PreparedPatch = Modulation | TimesAndCondition
"""The modulation of all evaluations [E, T, D], or what it is computed from at each evaluation."""


def modulated_at_once(tokens: int, num_evaluations: int, width: int) -> bool:
    """Whether a patch's modulation is computed for all evaluations of the head at once.

    A fifth of the head's weights compute it. While the tokens are few, reading weights takes most
    of the time, and computed at once they are read once for a patch. But the results are written
    and read for each token, so the tokens must be far fewer than the head is wide. The stored
    result has at most 14 vectors of that width for each of 2^14 tokens: 2.2 GiB in a released
    text-to-image model.
    """
    return tokens <= 256 and 16 * tokens <= width and tokens * num_evaluations <= 2**14
