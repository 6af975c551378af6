"""Attention: masks, the KV cache, and the choice of the kernel.

Heads come before positions, [B, A, T, F]: both products then read keys and values in order, which
halves the time of cached attention on CPUs compared with [B, T, A, F].
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from bitdance_jax.errors import ConfigError
from bitdance_jax.nn.packed_attention import PackedMask, attend_packed


TrainingKernel = Literal["xla", "cudnn", "pallas"]
"""The implementation of attention: XLA's products, cuDNN's fused kernel on CUDA GPUs, or Pallas'
fused kernels on TPUs."""

Kernel = TrainingKernel | Literal["mxu"]
"""In sampling also XLA's products of MATRIX_ROWS queries or more, for the matrix units of TPUs."""

MATRIX_ROWS = 8
"""Of fewer queries XLA makes sums of products in a TPU's vector units."""

LONGEST_MASK = 2048
"""cuDNN gets the mask of packed documents as an array, queries by keys: rows up to this length."""


def choose_kernel(
    name: Literal["auto"] | TrainingKernel, dtype: DTypeLike, device: Any = None
) -> TrainingKernel:
    """The kernel for a device, by default JAX's first.

    "auto" is in bfloat16 Pallas' on TPUs and cuDNN's on NVIDIA GPUs since Ampere, else XLA's.
    """
    if name != "auto":
        return name
    device = device or jax.devices()[0]
    if device.platform == "tpu" and jnp.dtype(dtype) == jnp.bfloat16:
        return "pallas"
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    recent = nvidia and float(device.compute_capability) >= 8.0
    return "cudnn" if recent and jnp.dtype(dtype) == jnp.bfloat16 else "xla"


def check_kernel(name: Literal["auto"] | TrainingKernel, device: Any = None) -> None:
    """Checks that a kernel runs on a device, by default JAX's first.

    Raises:
      ConfigError: it does not.
    """
    platform = (device or jax.devices()[0]).platform
    for kernel, needed in (("pallas", "tpu"), ("cudnn", "gpu")):
        if name == kernel and platform != needed:
            raise ConfigError(
                f"attention {name} needs a {needed.upper()}, and the device is a "
                f"{platform.upper()}; use auto or xla",
                "run.attention",
            )


def choose_sampling_kernel(
    dtype: DTypeLike, *, block: int, head_dim: int, device: Any = None
) -> Kernel:
    """The kernel for reading blocks of `block` tokens through a cache.

    cuDNN's reads the filled positions, XLA's reads all. On an H100 cuDNN's takes about 0.6
    times as long for blocks of 16 tokens, and 1.25 times as long for single tokens. Pallas' have
    no cache.
    """
    if (device or jax.devices()[0]).platform == "tpu" and block < MATRIX_ROWS:
        return "mxu"
    if block < 16 or head_dim % 8 or head_dim > 128:
        return "xla"
    kernel = choose_kernel("auto", dtype, device)
    return "xla" if kernel == "pallas" else kernel


@jax.tree_util.register_static
@dataclass(frozen=True)
class BlockCausal:
    """The mask of `block_causal_mask`, as a rule: kernels that know the rule need no array.

    Attributes:
      prefix: number of first tokens that attend causally.
      block: tokens of a block; 1 is plain causal attention.
    """

    prefix: int
    block: int

    def array(self, total: int) -> Bool[np.ndarray, "T T"]:
        return block_causal_mask(total, self.prefix, self.block)


Mask = Bool[Array, "*#B Q T"] | Bool[np.ndarray, "*#B Q T"] | BlockCausal | PackedMask
"""Which of T keys each of Q queries sees, shared by the rows of a batch or not."""


def block_causal_mask(total: int, prefix: int, block: int) -> Bool[np.ndarray, "T T"]:
    """Which key (column) a query (row) sees: those before it, and all of its block (paper 3.3).

    The first `prefix` tokens attend causally; after them every `block` tokens form a block.
    block = 1 is plain causal attention.
    """
    position = np.arange(total)
    block_of = np.where(position < prefix, -1 - position, (position - prefix) // block)
    return (position[:, None] >= position[None, :]) | (block_of[:, None] == block_of[None, :])


class KVCache(NamedTuple):
    """Keys and values of one layer for a fixed number of positions."""

    k: Float[Array, "B G T F"]
    v: Float[Array, "B G T F"]


def empty_cache(
    batch: int, length: int, num_heads: int, head_dim: int, dtype: DTypeLike
) -> KVCache:
    shape = (batch, num_heads, length, head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_cache(
    cache: KVCache,
    k: Float[Array, "B G Q F"],
    v: Float[Array, "B G Q F"],
    start: Int[Array, ""] | int,
) -> KVCache:
    """The cache with Q new positions written from `start` on."""
    return KVCache(
        jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), start, axis=2),
        jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), start, axis=2),
    )


def attend_through_cache(
    q: Float[Array, "B A Q F"],
    k: Float[Array, "B G Q F"],
    v: Float[Array, "B G Q F"],
    mask: Mask | None,
    kernel: Kernel,
    cache: KVCache | None,
    start: Int[Array, ""] | int,
) -> tuple[Float[Array, "B A Q F"], KVCache | None]:
    """`attend` of Q new tokens to themselves, or to the first T positions of a cache.

    Their keys and values are first written into the cache, from position `start` on.
    """
    if cache is not None:
        if mask is None or isinstance(mask, BlockCausal | PackedMask):
            raise ValueError("with a cache the mask must be an array: what each new token sees")
        cache = write_cache(cache, k, v, start)
        visible = mask.shape[-1]
        k = cache.k[:, :, :visible].astype(q.dtype)
        v = cache.v[:, :, :visible].astype(q.dtype)
        # The prefix, which starts at 0, is read once, and its padding sees nothing.
        if kernel == "cudnn" and not isinstance(start, int):
            return _attend_by_cudnn(q, k, v, mask, start + q.shape[2]), cache
        queries = q.shape[2]
        if kernel == "mxu" and queries < MATRIX_ROWS:
            q = _pad_to_multiple(q, MATRIX_ROWS, axis=2)
            mask = _pad_to_multiple(jnp.asarray(mask), MATRIX_ROWS, axis=mask.ndim - 2)
        return attend(q, k, v, mask)[:, :, :queries], cache
    return attend(q, k, v, mask, kernel), cache


def attend(
    q: Float[Array, "B A Q F"],
    k: Float[Array, "B G T F"],
    v: Float[Array, "B G T F"],
    mask: Mask | None,
    kernel: Kernel = "xla",
) -> Float[Array, "B A Q F"]:
    """Scaled dot-product attention, softmax in float32.

    Each of G key heads is for A / G neighbouring query heads. A query that sees nothing, such as
    padding, gets the mean of the values.

    Kernels: "xla" runs everywhere, and "mxu" is the same here; "cudnn" is the fused one of CUDA
    GPUs, for float16 and bfloat16, with packed documents in rows of at most LONGEST_MASK tokens;
    "pallas" is fused on TPUs for packed documents, and otherwise the same as "xla" here: see
    `tpu_attention` for the other.
    """
    if isinstance(mask, PackedMask):
        if kernel == "pallas":
            # Pallas takes a third of a second to import, and only TPUs need it.
            from bitdance_jax.nn import splash_attention

            return splash_attention.attend_packed(q, k, v, mask)
        if kernel != "cudnn" or q.shape[2] > LONGEST_MASK:
            return attend_packed(q, k, v, mask)
        mask = mask.array()
    if kernel == "cudnn":
        return _attend_by_cudnn(q, k, v, mask)
    if isinstance(mask, BlockCausal):
        mask = mask.array(q.shape[2])
    heads = rearrange(q * q.shape[-1] ** -0.5, "b (m g) s d -> b m (g s) d", m=k.shape[1])
    scores = jnp.einsum("bmsd,bmtd->bmst", heads, k, preferred_element_type=jnp.float32)
    if mask is not None:
        bias = jnp.where(mask, 0.0, -1e30).astype(jnp.float32)[..., None, :, :]
        scores = scores + jnp.tile(bias, (q.shape[1] // k.shape[1], 1))
    # After the second product there are Q x F numbers to normalize in place of Q x T.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum(
        "bmst,bmtd->bmsd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)
    return rearrange(out, "b m (g s) d -> b (m g) s d", s=q.shape[2])


def _attend_by_cudnn(
    q: Float[Array, "B A Q F"],
    k: Float[Array, "B G T F"],
    v: Float[Array, "B G T F"],
    mask: Mask | None,
    filled: Int[Array, ""] | None = None,
) -> Float[Array, "B A Q F"]:
    """`attend` to the first `filled` keys, or to all.

    Its backward pass takes even lengths only. No query sees a padded key.
    """
    queries = q.shape[2]
    keys = k.shape[2]
    if mask is None and keys % 2:
        mask = np.ones((queries, keys), bool)
    causal = isinstance(mask, BlockCausal) and mask.block == 1
    if causal:
        mask = None
    elif isinstance(mask, BlockCausal):
        mask = mask.array(queries)
    q, k, v = (jnp.swapaxes(_pad_to_multiple(x, 2, axis=2), 1, 2) for x in (q, k, v))
    if mask is not None:
        mask = jnp.asarray(mask).reshape(-1, 1, queries, keys)
        mask = _pad_to_multiple(_pad_to_multiple(mask, 2, axis=2), 2, axis=3)
    lengths = None if filled is None else jnp.full(q.shape[:1], filled, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return jnp.swapaxes(out, 1, 2)[:, :, :queries]


def _pad_to_multiple(x: Array, multiple: int, axis: int) -> Array:
    """Zeros, or False, at the end of an axis."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, pad)
