"""Latents of both kinds: of values, and in files; bits take one bit each, real numbers float16."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from bitdance_jax.config import Latents, TokenizerConfig
from bitdance_jax.tokenizer import lfq


def to_latents(values: Float[Array, "*B K"], latents: Latents) -> Float[Array, "*B K"]:
    """What a model reads: codes in {-1, 1} of values before the sign, or the values themselves.

    Args:
      values: of an encoder, or of a head.
      latents: of the tokenizer.
    """
    return lfq.quantize(values) if latents == "bits" else values


def code_dtype(latents: Latents) -> jnp.dtype:
    """The type of latents outside of programs: int8 for bits, float32 for continuous ones."""
    return jnp.dtype(jnp.int8 if latents == "bits" else jnp.float32)


def pack(values: Float[Array, "*B K"], config: TokenizerConfig) -> UInt8[Array, "*B bytes"]:
    """Latents of an encoder's values as bytes, `config.packed_bytes` for each token."""
    if config.latents == "bits":
        return jnp.packbits(lfq.quantize(values) > 0, axis=-1)
    limit = float(jnp.finfo(jnp.float16).max)
    rounded = jnp.clip(values, -limit, limit).astype(jnp.float16)
    pairs = jax.lax.bitcast_convert_type(rounded, jnp.uint8)
    return rearrange(pairs, "... k two -> ... (k two)")


def unpack(packed: UInt8[Array, "*B bytes"], config: TokenizerConfig) -> Float[Array, "*B K"]:
    """Inverse of `pack`, float32: codes in {-1, 1}, or continuous latents."""
    if config.latents == "bits":
        bits = jnp.unpackbits(packed, axis=-1)[..., : config.bits]
        return jnp.where(bits > 0, 1.0, -1.0)
    pairs = rearrange(packed, "... (k two) -> ... k two", two=2)
    return jax.lax.bitcast_convert_type(pairs, jnp.float16).astype(jnp.float32)
