"""The binary diffusion head f(x_t, t, z) (paper 3.2): a small DiT that predicts all the clean bits of one patch at once.

As under PyTorch's autocast, linear layers give the compute type, and so does the sum of a residual stream that begins
with one and adds no more than their gated results; norms give float32, and so does what modulates it, before the next layer.

Inside, the P tokens of all B patches are N rows, one after another. Where the weights are cut over devices (the axis "tensor"), the rows
are whole in the products and cut between them, so that each device norms and modulates its own.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bitdance_jax.config import FlowHeadConfig
from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.nn import attention, linear
from bitdance_jax.nn.layers import FusedDense, SwiGLU, head_init
from bitdance_jax.nn.stack import stacked


TIME_FEATURES = 256
_EXPONENTS = (
    np.float32(-np.log(10000.0))
    * np.arange(TIME_FEATURES // 2, dtype=np.float32)
    / np.float32(TIME_FEATURES // 2)
)
TIME_FREQUENCIES = np.exp(_EXPONENTS.astype(np.float64)).astype(np.float32)
"""10000^(-i/128). Angles reach 1000 rad, where a frequency's last digit counts: the exponent is rounded to float32 as in the release."""


def timestep_features(t: Float[Array, "*B"]) -> Float[Array, "*B 256"]:
    """Sinusoidal features of 1000 t, cosines first, max period 10000 (DiT's)."""
    angles = 1000.0 * t.astype(jnp.float32)[..., None] * TIME_FREQUENCIES
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(
    x: Float[Array, "N D"], scale: Float[Array, "N D"], shift: Float[Array, "N D"]
) -> Float[Array, "N D"]:
    return x * (1 + scale) + shift


class TimeEmbedding(nn.Module):
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: Float[Array, "*B"]) -> Float[Array, "*B D"]:
        init = nn.initializers.normal(0.02)
        y = linear.Dense(self.width, kernel_init=init, dtype=self.dtype, name="fc1")(
            timestep_features(t)
        )
        return linear.Dense(self.width, kernel_init=init, dtype=self.dtype, name="fc2")(nn.silu(y))


class PlainMLP(nn.Module):
    """Linear, silu, Linear (`use_swiglu` false)."""

    hidden: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        y = linear.Dense(self.hidden, kernel_init=head_init, dtype=self.dtype, name="fc1")(x)
        return linear.Dense(self.features, kernel_init=head_init, dtype=self.dtype, name="fc2")(
            nn.silu(y)
        )


class PatchAttention(nn.Module):
    """Full attention among the tokens of one patch, without positions."""

    config: FlowHeadConfig
    tokens_per_step: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        qkv = FusedDense(
            3, self.config.width, use_bias=True, kernel_init=head_init, dtype=self.dtype, name="qkv"
        )(x)
        split = functools.partial(
            rearrange,
            pattern="(b p) (n d) -> b n p d",
            p=self.tokens_per_step,
            d=self.config.head_dim,
        )
        q, k, v = (constrain(split(y), "batch", "heads", None, None) for y in qkv)
        out = attention.attend(q, k, v, mask=None)
        project = linear.Dense(
            self.config.width, kernel_init=head_init, dtype=self.dtype, name="out"
        )
        return project(rearrange(out, "b n p d -> (b p) (n d)"))


class HeadBlock(nn.Module):
    """One block, modulated by its group's adaLN vectors: a transformer block, or an MLP block when a patch is one token."""

    config: FlowHeadConfig
    tokens_per_step: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N D"], modulation: list[Float[Array, "N D"]]
    ) -> tuple[Float[Array, "N D"], None]:
        config, hidden = self.config, int(1.5 * self.config.width)
        if config.use_swiglu:
            mlp: nn.Module = SwiGLU(
                hidden,
                config.width,
                use_bias=True,
                kernel_init=head_init,
                dtype=self.dtype,
                name="mlp",
            )
        else:
            mlp = PlainMLP(hidden, config.width, self.dtype, name="mlp")
        if self.tokens_per_step > 1:
            scale, shift, gate = modulation[:3]
            y = modulate(_norm("attention_norm", self.dtype)(x), scale, shift).astype(self.dtype)
            attend = PatchAttention(config, self.tokens_per_step, self.dtype, name="attention")
            x = x + gate * _cut(attend(_whole(y)))
        scale, shift, gate = modulation[-3:]
        y = modulate(_norm("mlp_norm", self.dtype)(x), scale, shift).astype(self.dtype)
        return x + gate * _cut(mlp(_whole(y))), None


def _norm(name: str | None, dtype: DTypeLike, *, affine: bool = True) -> nn.LayerNorm:
    """LayerNorm whose result, float32, is rounded to the compute type only after it is modulated."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return nn.LayerNorm(
        1e-6, use_bias=affine, use_scale=affine, use_fast_variance=False, dtype=wide, name=name
    )


def _cut(x: Float[Array, "*E N D"]) -> Float[Array, "*E N D"]:
    return constrain(x, *[None] * (x.ndim - 2), "tokens", None)


def _whole(x: Float[Array, "*E N D"]) -> Float[Array, "*E N D"]:
    return constrain(x, *[None] * (x.ndim - 2), "batch", None)


class HeadGroup(nn.Module):
    """Consecutive blocks that share one adaLN layer."""

    config: FlowHeadConfig
    tokens_per_step: int
    scan: bool
    remat: str | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        config, count = self.config, self.config.num_blocks // self.config.num_groups
        vectors = 6 if self.tokens_per_step > 1 else 3
        self.ada_ln = FusedDense(vectors, config.width, True, nn.initializers.zeros, self.dtype)
        arguments: tuple[Any, ...] = (config, self.tokens_per_step, self.dtype)
        if self.scan:
            self.blocks: Any = stacked(HeadBlock, count, self.remat)(*arguments)
        else:
            self.blocks = [HeadBlock(*arguments) for _ in range(count)]

    def modulation(self, y: Float[Array, "*E N D"]) -> list[Float[Array, "*E N D"]]:
        """The blocks' scales, shifts and gates."""
        return [_cut(vector) for vector in self.ada_ln(y)]

    def run(
        self, x: Float[Array, "N D"], modulation: list[Float[Array, "N D"]]
    ) -> Float[Array, "N D"]:
        if self.scan:
            return self.blocks(x, modulation)[0]
        for block in self.blocks:
            x, _ = block(x, modulation)
        return x

    def __call__(
        self, x: Float[Array, "N D"], y: Float[Array, "N D"]
    ) -> tuple[Float[Array, "N D"], None]:
        return self.run(x, self.modulation(y)), None


class FlowHead(nn.Module):
    """Predicts clean bits from noisy ones.

    Sampling calls the parts apart: `embed_time` once for all patches, `prepare` once for a patch, `predict` at every evaluation.

    Attributes:
      config: sizes.
      bits: K, bits of a token.
      tokens_per_step: P, tokens of a patch.
      scan: parameters stacked and blocks scanned (training), or unrolled.
      remat: see `BlockCausalTransformer`.
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
        arguments: tuple[Any, ...] = (
            config,
            self.tokens_per_step,
            self.scan,
            self.remat,
            self.dtype,
        )
        if self.scan:
            self.groups: Any = stacked(HeadGroup, config.num_groups, None)(*arguments)
        else:
            self.groups = [HeadGroup(*arguments) for _ in range(config.num_groups)]
        self.final_norm = _norm(None, self.dtype, affine=False)
        self.final_ada_ln = FusedDense(2, config.width, True, nn.initializers.zeros, self.dtype)
        self.final_linear = linear.Dense(
            self.bits, kernel_init=nn.initializers.zeros, dtype=jnp.float32
        )

    def embed_time(self, t: Float[Array, "*B"]) -> Float[Array, "*B D"]:
        """Times in [0, 1] to vectors of the head's width."""
        return self.time_embed(t)

    def embed_condition(self, z: Float[Array, "*B P C"]) -> Float[Array, "*B P D"]:
        """The transformer's states at a patch to vectors of the head's width."""
        condition = self.cond_embed(z)
        return constrain(
            condition, "batch", *[None] * (condition.ndim - 1)
        )  # whole before it meets the times, which are many

    def modulation(
        self, time: Float[Array, "*b D"], condition: Float[Array, "B P D"]
    ) -> "Modulation":
        """What the blocks and the last layer are modulated by, of unrolled groups.

        Args:
          time: `embed_time` of the times: [D] for all rows, [B, 1, D], or [E, 1, 1, D] for E evaluations at once.
          condition: `embed_condition` of the states.
        """
        y = self._style(time, condition)
        return [group.modulation(y) for group in self.groups], [
            _cut(vector) for vector in self.final_ada_ln(y)
        ]

    def prepare(self, states: Float[Array, "B P C"], times: Float[Array, "E D"]) -> "Prepared":
        """What `predict` needs beside the noisy bits of one patch; unrolled groups.

        Args:
          states: the transformer's at the patch.
          times: `embed_time` of the evaluations' times.
        """
        condition = self.embed_condition(states)
        if modulated_at_once(states.shape[0] * states.shape[1], *times.shape):
            return self.modulation(times[:, None, None], condition)
        return TimesAndCondition(times, condition)

    def predict(
        self, x_t: Float[Array, "B P K"], prepared: "Prepared", evaluation: Int[Array, ""] | int
    ) -> Float[Array, "B P K"]:
        """The clean bits predicted at one evaluation, by its number, from noisy ones; float32.

        Args:
          x_t: noisy bits; 1 for the data, 0 for the noise end of time.
          prepared: `prepare` of all evaluations.
          evaluation: 0 ... E - 1.
        """

        def at(array: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(array, evaluation, keepdims=False)

        if isinstance(prepared, TimesAndCondition):
            return self.denoise(x_t, at(prepared.times), prepared.condition)
        return self._predict(x_t, jax.tree.map(at, prepared))

    def denoise(
        self,
        x_t: Float[Array, "B P K"],
        time: Float[Array, "*b D"],
        condition: Float[Array, "B P D"],
    ) -> Float[Array, "B P K"]:
        """The predicted clean bits, float32, at embedded times and conditions; the groups may be scanned."""
        if not self.scan:
            return self._predict(x_t, self.modulation(time, condition))
        y = self._style(time, condition)
        x, _ = self.groups(self._embed(x_t), y)
        return self._bits(x, self.final_ada_ln(y))

    def _predict(
        self, x_t: Float[Array, "B P K"], modulation: "Modulation"
    ) -> Float[Array, "B P K"]:
        vectors, last = modulation
        x = self._embed(x_t)
        for group, own in zip(self.groups, vectors, strict=True):
            x = group.run(x, own)
        return self._bits(x, last)

    def __call__(
        self, x_t: Float[Array, "B P K"], t: Float[Array, "B"], z: Float[Array, "B P C"]
    ) -> Float[Array, "B P K"]:
        """`denoise` with both embeddings made on the spot: one time and one state for each patch."""
        return self.denoise(x_t, self.embed_time(t)[:, None], self.embed_condition(z))

    def _style(
        self, time: Float[Array, "*b D"], condition: Float[Array, "B P D"]
    ) -> Float[Array, "*E N D"]:
        # Rows stay where they are: the kernels, cut over the same devices, would draw the activations after them.
        return _whole(rearrange(nn.silu(time + condition), "... b p d -> ... (b p) d"))

    def _embed(self, x_t: Float[Array, "B P K"]) -> Float[Array, "N D"]:
        return _cut(self.input_proj(_cut(_whole(rearrange(x_t, "b p k -> (b p) k")))))

    def _bits(
        self, x: Float[Array, "N D"], modulation: list[Float[Array, "N D"]]
    ) -> Float[Array, "B P K"]:
        out = self.final_linear(modulate(self.final_norm(x), *modulation))
        out = rearrange(_whole(out), "(b p) k -> b p k", p=self.tokens_per_step)
        return 2 * nn.sigmoid(out) - 1 if self.config.squash_output else out


Modulation = tuple[list[list[Float[Array, "*E N D"]]], list[Float[Array, "*E N D"]]]
"""(each group's vectors, the last layer's)."""


class TimesAndCondition(NamedTuple):
    """`embed_time` of the times of all evaluations, and `embed_condition` of a patch's states."""

    times: Float[Array, "E D"]
    condition: Float[Array, "B P D"]


Prepared = Modulation | TimesAndCondition
"""The modulation of all evaluations [E, N, D], or what it is made of at each of them."""


def modulated_at_once(rows: int, evaluations: int, width: int) -> bool:
    """Whether a patch's modulation is made for all evaluations of the head at once.

    A fifth of the head's weights make it. While the rows are few, reading weights is what takes the time, and those are then read once a
    patch; but what they make is written and read for each row, so that the rows must be far fewer than the head is wide. The bound on
    what is kept is 14 vectors of that width for each of 2^14 rows: 2.2 GiB of a released text-to-image model.
    """
    return rows <= 256 and 16 * rows <= width and rows * evaluations <= 2**14
