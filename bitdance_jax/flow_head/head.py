"""The binary diffusion head f(x_t, t, z) (paper 3.2): a small DiT that predicts all the clean bits of one patch at once."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitdance_jax import linear
from bitdance_jax.config import FlowHeadConfig
from bitdance_jax.sharding import constrain
from bitdance_jax.transformer import attention
from bitdance_jax.transformer.layers import FusedDense, SwiGLU, head_init
from bitdance_jax.transformer.stack import stacked


TIME_FEATURES = 256
_EXPONENTS = np.float32(-np.log(10000.0)) * np.arange(TIME_FEATURES // 2, dtype=np.float32) / np.float32(TIME_FEATURES // 2)
TIME_FREQUENCIES = np.exp(_EXPONENTS.astype(np.float64)).astype(np.float32)
"""10000^(-i/128). Angles reach 1000 rad, where a frequency's last digit counts: the exponent is rounded to float32 as in the release."""


def timestep_features(t: Float[Array, "*B"]) -> Float[Array, "*B 256"]:
    """Sinusoidal features of 1000 t, cosines first, max period 10000 (DiT's)."""
    angles = 1000.0 * t.astype(jnp.float32)[..., None] * TIME_FREQUENCIES
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(x: Float[Array, "B P D"], scale: Float[Array, "B P D"], shift: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
    return x * (1 + scale) + shift


class TimeEmbedding(nn.Module):
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: Float[Array, "*B"]) -> Float[Array, "*B D"]:
        init = nn.initializers.normal(0.02)
        y = linear.Dense(self.width, kernel_init=init, dtype=self.dtype, name="fc1")(timestep_features(t))
        return linear.Dense(self.width, kernel_init=init, dtype=self.dtype, name="fc2")(nn.silu(y))


class PlainMLP(nn.Module):
    """Linear, silu, Linear (`use_swiglu` false)."""

    hidden: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        y = linear.Dense(self.hidden, kernel_init=head_init, dtype=self.dtype, name="fc1")(x)
        return linear.Dense(self.features, kernel_init=head_init, dtype=self.dtype, name="fc2")(nn.silu(y))


class PatchAttention(nn.Module):
    """Full attention among the tokens of one patch, without positions."""

    config: FlowHeadConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        qkv = FusedDense(3, self.config.width, use_bias=True, kernel_init=head_init, dtype=self.dtype, name="qkv")(x)
        q, k, v = (constrain(rearrange(y, "b p (n d) -> b n p d", d=self.config.head_dim), "batch", "heads", None, None) for y in qkv)
        out = attention.attend(q, k, v, mask=None)
        project = linear.Dense(self.config.width, kernel_init=head_init, dtype=self.dtype, name="out")
        return project(rearrange(out, "b n p d -> b p (n d)"))


class HeadBlock(nn.Module):
    """One block, modulated by its group's adaLN vectors: a transformer block, or an MLP block when a patch is one token."""

    config: FlowHeadConfig
    tokens_per_step: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"], modulation: list[Float[Array, "B P D"]]) -> tuple[Float[Array, "B P D"], None]:
        config, hidden = self.config, int(1.5 * self.config.width)
        if config.use_swiglu:
            mlp: nn.Module = SwiGLU(hidden, config.width, use_bias=True, kernel_init=head_init, dtype=self.dtype, name="mlp")
        else:
            mlp = PlainMLP(hidden, config.width, self.dtype, name="mlp")
        if self.tokens_per_step > 1:
            scale, shift, gate = modulation[:3]
            y = modulate(nn.LayerNorm(1e-6, dtype=self.dtype, use_fast_variance=False, name="attention_norm")(x), scale, shift)
            x = x + gate * PatchAttention(config, self.dtype, name="attention")(y)
        scale, shift, gate = modulation[-3:]
        y = modulate(nn.LayerNorm(1e-6, dtype=self.dtype, use_fast_variance=False, name="mlp_norm")(x), scale, shift)
        return constrain(x + gate * mlp(y), "batch", None, None), None


class HeadGroup(nn.Module):
    """Consecutive blocks that share one adaLN layer."""

    config: FlowHeadConfig
    tokens_per_step: int
    scan: bool
    remat: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"], y: Float[Array, "B P D"]) -> tuple[Float[Array, "B P D"], None]:
        config = self.config
        vectors = 6 if self.tokens_per_step > 1 else 3
        modulation = FusedDense(vectors, config.width, True, nn.initializers.zeros, self.dtype, name="ada_ln")(y)
        blocks = config.num_blocks // config.num_groups
        arguments: tuple[Any, ...] = (config, self.tokens_per_step, self.dtype)
        if self.scan:
            return stacked(HeadBlock, blocks, self.remat)(*arguments, name="blocks")(x, modulation)
        for i in range(blocks):
            x, _ = HeadBlock(*arguments, name=f"blocks_{i}")(x, modulation)
        return x, None


class FlowHead(nn.Module):
    """Predicts clean bits from noisy ones.

    Sampling calls the three parts apart: `embed_time` once for all steps, `embed_condition` once for a patch, `denoise` at every step.

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
        arguments: tuple[Any, ...] = (config, self.tokens_per_step, self.scan, self.remat, self.dtype)
        if self.scan:
            self.groups: Any = stacked(HeadGroup, config.num_groups, None)(*arguments)
        else:
            self.groups = [HeadGroup(*arguments) for _ in range(config.num_groups)]
        self.final_norm = nn.LayerNorm(1e-6, use_bias=False, use_scale=False, use_fast_variance=False, dtype=self.dtype)
        self.final_ada_ln = FusedDense(2, config.width, True, nn.initializers.zeros, self.dtype)
        self.final_linear = linear.Dense(self.bits, kernel_init=nn.initializers.zeros, dtype=jnp.float32)

    def embed_time(self, t: Float[Array, "*B"]) -> Float[Array, "*B D"]:
        """Times in [0, 1] to vectors of the head's width."""
        return self.time_embed(t)

    def embed_condition(self, z: Float[Array, "*B P C"]) -> Float[Array, "*B P D"]:
        """The transformer's states at a patch to vectors of the head's width."""
        return self.cond_embed(z)

    def denoise(self, x_t: Float[Array, "B P K"], time: Float[Array, "*b D"], condition: Float[Array, "B P D"]) -> Float[Array, "B P K"]:
        """The predicted clean bits, float32.

        Args:
          x_t: noisy bits; 1 for the data, 0 for the noise end of time.
          time: `embed_time` of the times, [D] for all rows or [B, 1, D].
          condition: `embed_condition` of the states.
        """
        # Rows stay where they are: the kernels, cut over the same devices, would draw the activations after them.
        y = constrain(nn.silu(time + condition), "batch", None, None)
        x = constrain(self.input_proj(constrain(x_t, "batch", None, None)), "batch", None, None)
        if self.scan:
            x, _ = self.groups(x, y)
        else:
            for group in self.groups:
                x, _ = group(x, y)
        scale, shift = self.final_ada_ln(y)
        out = self.final_linear(modulate(self.final_norm(x), scale, shift))
        return 2 * nn.sigmoid(out) - 1 if self.config.squash_output else out

    def __call__(self, x_t: Float[Array, "B P K"], t: Float[Array, "B"], z: Float[Array, "B P C"]) -> Float[Array, "B P K"]:
        """`denoise` with both embeddings made on the spot: one time and one state for each patch."""
        return self.denoise(x_t, self.embed_time(t)[:, None], self.embed_condition(z))
