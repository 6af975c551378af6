"""Lookup-free quantization (paper 3.1): a code is the sign of each channel.

The bits of a token are split into groups of k; a group's code is one of 2^k. Logits over a group's
codes are 2 <z, code> / temperature, so the distribution is a product of independent bits. The
entropy terms use that: no array has size 2^bits, or (tokens x 2^k).
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int


def quantize(z: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """The code of z: +1 where z > 0, else -1, in z's dtype."""
    return jnp.where(z > 0, 1, -1).astype(z.dtype)


def quantize_straight_through(z: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """`quantize`, whose gradient is the identity."""
    return z + jax.lax.stop_gradient(quantize(z) - z)


def codes_to_indices(codes: Float[Array, "*B K"], num_codebooks: int) -> Int[Array, "*B G"]:
    """Index of each group's code in [0, 2^k); the first bit of a group is the least significant.

    Groups have at most 31 bits.
    """
    bits = rearrange(codes > 0, "... (g k) -> ... g k", g=num_codebooks)
    return jnp.sum(bits * _place_values(bits.shape[-1]), axis=-1, dtype=jnp.int32)


def indices_to_codes(indices: Int[Array, "*B G"], bits: int) -> Float[Array, "*B K"]:
    """Inverse of `codes_to_indices`, float32 in {-1, 1}; `bits` is the number in all groups."""
    set_bits = indices[..., None] & _place_values(bits // indices.shape[-1])
    return rearrange(jnp.where(set_bits != 0, 1.0, -1.0), "... g k -> ... (g k)")


def _place_values(bits: int) -> np.ndarray:
    if bits > 31:
        raise ValueError(f"a group of {bits} bits has no int32 index; use more codebooks")
    return 2 ** np.arange(bits, dtype=np.int32)


def entropy_terms(
    z: Float[Array, "*B K"], num_codebooks: int, temperature: float = 0.01
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean entropy of the code distributions, and entropy of the mean distribution, both in nats.

    The mean is over batch, positions and groups, which share one codebook. The second entropy has
    an epsilon of 1e-5 inside the logarithm, as released. Confident and varied codes have a small
    first and a large second term: the loss is first - second.
    """
    logits = rearrange(
        4.0 * z.astype(jnp.float32) / temperature, "... (g k) -> (... g) k", g=num_codebooks
    )
    per_sample = jnp.mean(jnp.sum(_bernoulli_entropy(logits), axis=-1))
    # The 2^k probabilities of a group are an outer product of two halves: their mean is one
    # product.
    half = logits.shape[-1] // 2
    high = _product_distribution(logits[:, :half])
    low = _product_distribution(logits[:, half:])
    mean = jnp.einsum("na,nb->ab", high, low, precision=jax.lax.Precision.HIGHEST) / logits.shape[0]
    codebook = -jnp.sum(mean * jnp.log(mean + 1e-5))
    return per_sample, codebook


def commitment(z: Float[Array, "*B K"]) -> Float[Array, ""]:
    """mean((z - code)^2), the code held constant."""
    return jnp.mean(jnp.square(z - jax.lax.stop_gradient(quantize(z))))


def _bernoulli_entropy(logits: Float[Array, "*B"]) -> Float[Array, "*B"]:
    size = jnp.abs(logits)
    return jnp.log1p(jnp.exp(-size)) + size * jax.nn.sigmoid(-size)


def _product_distribution(logits: Float[Array, "N k"]) -> Float[Array, "N codes"]:
    """Probabilities of all 2^k codes of k independent bits."""
    probabilities = jnp.ones((logits.shape[0], 1), logits.dtype)
    for bit in range(logits.shape[1]):
        off_on = jnp.stack(
            [jax.nn.sigmoid(-logits[:, bit]), jax.nn.sigmoid(logits[:, bit])], axis=-1
        )
        probabilities = rearrange(
            probabilities[:, :, None] * off_on[:, None, :], "n a b -> n (a b)"
        )
    return probabilities
