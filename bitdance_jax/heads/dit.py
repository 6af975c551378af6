"""The blocks of the binary diffusion head: a DiT over the tokens of one patch (paper 3.2).

The P tokens of all R patches are one axis T = R P. Where the weights are sharded over the mesh axis
"tensor", that axis is replicated within products and sharded between them, so that each device
normalizes and modulates its own tokens.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax.config import FlowHeadConfig
from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.nn import attention, linear
from bitdance_jax.nn.layers import FusedDense, SwiGLU, head_init
from bitdance_jax.nn.stack import repeat


TIME_FEATURES = 256
_EXPONENTS = (
    np.float32(-np.log(10000.0))
    * np.arange(TIME_FEATURES // 2, dtype=np.float32)
    / np.float32(TIME_FEATURES // 2)
)
TIME_FREQUENCIES = np.exp(_EXPONENTS.astype(np.float64)).astype(np.float32)
"""10000^(-i/128). Angles reach 1000 rad, where the last digit of a frequency matters: as in the
release the exponent is rounded to float32."""


def timestep_features(t: Float[Array, "*B"]) -> Float[Array, "*B 256"]:
    """Sinusoidal features of 1000 t, cosines first, max period 10000 (DiT's)."""
    angles = 1000.0 * t.astype(jnp.float32)[..., None] * TIME_FREQUENCIES
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """Times in [0, 1] to vectors: `timestep_features`, Linear, silu, Linear."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: Float[Array, "*B"]) -> Float[Array, "*B D"]:
        dense = functools.partial(
            linear.Dense, self.width, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype
        )
        return dense(name="fc2")(nn.silu(dense(name="fc1")(timestep_features(t))))


def modulate(
    x: Float[Array, "T D"], scale: Float[Array, "T D"], shift: Float[Array, "T D"]
) -> Float[Array, "T D"]:
    return x * (1 + scale) + shift


def layer_norm(name: str | None, dtype: DTypeLike, *, affine: bool = True) -> nn.LayerNorm:
    """LayerNorm with a float32 result, which is rounded to the compute type after modulation."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return nn.LayerNorm(
        1e-6, use_bias=affine, use_scale=affine, use_fast_variance=False, dtype=wide, name=name
    )


def shard_tokens(x: Float[Array, "*E T D"]) -> Float[Array, "*E T D"]:
    """Tokens sharded over all devices, between products."""
    return constrain(x, *[None] * (x.ndim - 2), "tokens", None)


def gather_tokens(x: Float[Array, "*E T D"]) -> Float[Array, "*E T D"]:
    """Tokens sharded over the batch axes alone, for a product."""
    return constrain(x, *[None] * (x.ndim - 2), "batch", None)


class PlainMLP(nn.Module):
    """Linear, silu, Linear (`use_swiglu` false)."""

    hidden: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        dense = functools.partial(linear.Dense, kernel_init=head_init, dtype=self.dtype)
        return dense(self.features, name="fc2")(nn.silu(dense(self.hidden, name="fc1")(x)))


class PatchAttention(nn.Module):
    """Full attention among the tokens of one patch, without positions."""

    config: FlowHeadConfig
    tokens_per_step: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        width = self.config.width
        qkv = FusedDense(
            3, width, use_bias=True, kernel_init=head_init, dtype=self.dtype, name="qkv"
        )(x)
        split = functools.partial(
            rearrange,
            pattern="(r p) (a f) -> r a p f",
            p=self.tokens_per_step,
            f=self.config.head_dim,
        )
        q, k, v = (constrain(split(y), "batch", "heads", None, None) for y in qkv)
        out = attention.attend(q, k, v, mask=None)
        project = linear.Dense(width, kernel_init=head_init, dtype=self.dtype, name="out")
        return project(rearrange(out, "r a p f -> (r p) (a f)"))


class HeadBlock(nn.Module):
    """A DiT block, modulated by its group's adaLN vectors; no attention if a patch is one token."""

    config: FlowHeadConfig
    tokens_per_step: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "T D"], modulation: list[Float[Array, "T D"]]
    ) -> tuple[Float[Array, "T D"], None]:
        if self.tokens_per_step > 1:
            scale_msa, shift_msa, gate_msa = modulation[:3]
            y = modulate(layer_norm("attention_norm", self.dtype)(x), scale_msa, shift_msa)
            attend = PatchAttention(self.config, self.tokens_per_step, self.dtype, name="attention")
            x = x + gate_msa * shard_tokens(attend(gather_tokens(y.astype(self.dtype))))
        scale_mlp, shift_mlp, gate_mlp = modulation[-3:]
        y = modulate(layer_norm("mlp_norm", self.dtype)(x), scale_mlp, shift_mlp)
        return x + gate_mlp * shard_tokens(self._mlp()(gather_tokens(y.astype(self.dtype)))), None

    def _mlp(self) -> nn.Module:
        width = self.config.width
        hidden = int(1.5 * width)
        if not self.config.use_swiglu:
            return PlainMLP(hidden, width, self.dtype, name="mlp")
        return SwiGLU(
            hidden, width, use_bias=True, kernel_init=head_init, dtype=self.dtype, name="mlp"
        )


class HeadGroup(nn.Module):
    """Consecutive blocks that share one adaLN layer."""

    config: FlowHeadConfig
    tokens_per_step: int
    scan: bool
    remat: str | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        config = self.config
        count = config.num_blocks // config.num_groups
        vectors = 6 if self.tokens_per_step > 1 else 3
        self.ada_ln = FusedDense(vectors, config.width, True, nn.initializers.zeros, self.dtype)
        self.blocks = repeat(
            HeadBlock,
            count,
            scan=self.scan,
            remat=self.remat,
            config=config,
            tokens_per_step=self.tokens_per_step,
            dtype=self.dtype,
        )

    def modulation(self, style: Float[Array, "*E T D"]) -> list[Float[Array, "*E T D"]]:
        """The blocks' scales, shifts and gates."""
        return [shard_tokens(vector) for vector in self.ada_ln(style)]

    def run(
        self, x: Float[Array, "T D"], modulation: list[Float[Array, "T D"]]
    ) -> Float[Array, "T D"]:
        """The blocks of the group, one after the other."""
        if self.scan:
            return self.blocks(x, modulation)[0]
        for block in self.blocks:
            x, _ = block(x, modulation)
        return x

    def __call__(
        self, x: Float[Array, "T D"], style: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T D"], None]:
        return self.run(x, self.modulation(style)), None
