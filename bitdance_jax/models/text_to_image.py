"""Text-to-image BitDance (paper 4.3): a language model and the prediction head.

A row is the prompt's tokens, `<|vision_start|>`, `<|res_h|>`, `<|res_w|>` (h and w in tokens),
P - 1 queries, and the visual tokens except the last P. `<|res_w|>` and the queries are the first
block: from their outputs the head predicts the first patch. The prompts of a batch differ in
length. They are padded on the left, so that a patch has the same positions of the KV cache in every
row. A prompt may show images: `<|vision_start|>`, `<|res_h|>`, `<|res_w|>`, visual tokens,
`<|vision_end|>`, all read causally.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int8

from bitdance_jax.config import TextToImageConfig
from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.errors import UserError
from bitdance_jax.heads.make import make_head
from bitdance_jax.nn import attention, linear
from bitdance_jax.nn.attention import KVCache, Mask
from bitdance_jax.nn.layers import residual_dtype
from bitdance_jax.tokenizer import lfq
from bitdance_jax.transformer import order
from bitdance_jax.transformer.qwen3 import Qwen3


Params = Any

PREFIX_LENGTHS = (64, 128, 256, 512, 1024)
"""Lengths of prompt, `<|vision_start|>` and `<|res_h|>` that rows are padded to; longer ones, which
show images, to multiples of the last. One program is compiled for all prompts up to each."""

CHUNK = PREFIX_LENGTHS[-1]
"""Positions of a prompt that are read at a time."""

MAX_PROMPT = PREFIX_LENGTHS[-1] - 2
"""Tokens of the longest prompt, with its template."""


class Connector(nn.Module):
    """Bits to the language model's width: Linear, tanh-gelu, Linear.

    Weights and biases start uniform within 1 / sqrt(inputs), as PyTorch's.
    """

    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, bits: Float[Array, "B Q K"]) -> Float[Array, "B Q D"]:
        def dense(name: str, x: Float[Array, "B Q C"]) -> Float[Array, "B Q D"]:
            limit = x.shape[-1] ** -0.5
            initial = functools.partial(jax.random.uniform, minval=-limit, maxval=limit)
            return linear.Dense(
                self.dim, kernel_init=initial, bias_init=initial, dtype=self.dtype, name=name
            )(x)

        return dense("fc2", nn.gelu(dense("fc1", bits), approximate=True))


class TextToImage(nn.Module):
    """Language model and head with their embeddings.

    Attributes:
      config: sizes.
      scan: stacked parameters and scanned layers (training), or unrolled (sampling).
      remat: what the backward pass stores (`nn.stack.remat_policy`).
      dtype: compute type.
      kernel: the language model's attention kernel.
    """

    config: TextToImageConfig
    scan: bool = False
    remat: str | None = None
    dtype: DTypeLike = jnp.float32
    kernel: attention.Kernel = "xla"

    def setup(self) -> None:
        config = self.config
        self.text = Qwen3(config.text, self.scan, self.remat, self.dtype, self.kernel)
        self.connector = Connector(config.text.dim, self.dtype)
        self.head = make_head(
            config.head,
            bits=config.tokenizer.bits,
            tokens_per_step=config.tokens_per_step,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
        )

    def embed_prefix(self, tokens: Int[Array, "B Q"]) -> Float[Array, "B Q D"]:
        return self.text.embed(tokens)

    def embed_bits(
        self, bits: Float[Array, "B Q K"], xy: Int[Array, "*#B S 2"]
    ) -> Float[Array, "B Q D"]:
        """Visual tokens at (x, y) of the grid, as the language model reads them."""
        residual = residual_dtype(self.config.text.residual_dtype, self.dtype)
        return self.connector(bits).astype(residual) + sinusoidal_2d(
            xy, self.config.text.dim
        ).astype(residual)

    def embed_prompts(
        self, tokens: Int[Array, "B Q"], shown: "ShownImages | None" = None
    ) -> Float[Array, "B Q D"]:
        """Rows of tokens with the images that they show."""
        x = self.embed_prefix(tokens)
        if shown is None:
            return x
        bits = jnp.asarray(shown.bits, jnp.float32)
        visual = self.embed_bits(bits, jnp.asarray(shown.xy)).astype(x.dtype)
        # Row by row, so that the compiler knows that no row reads another one's device.
        x = jax.vmap(lambda row, slots, new: row.at[slots].set(new, mode="drop"))(
            x, jnp.asarray(shown.slots), visual
        )
        return constrain(x, "batch", None, None)

    def read(
        self,
        x: Float[Array, "B Q D"],
        positions: Int[Array, "#B Q"],
        mask: Mask,
        cache: list[KVCache] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B Q D"], list[KVCache] | None]:
        return self.text(x, positions, mask, cache, start)

    def condition(
        self, hidden: Float[Array, "B Q D"], xy: Int[Array, "Q 2"]
    ) -> Float[Array, "B Q D"]:
        """What the head reads for visual tokens at (x, y): hidden state plus position embedding."""
        return hidden + sinusoidal_2d(xy, self.config.text.dim).astype(hidden.dtype)

    def hidden(
        self, tokens: Int[Array, "B Q"], xy: Int[Array, "T 2"], bits: Float[Array, "B T K"]
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B N P D"]]:
        """Outputs for the Q tokens of the prefix, and what the head reads at every patch.

        Args:
          tokens: ids without padding; the last P are the first block.
          xy: `token_positions`.
          bits: in {-1, 1}, in sequence order.
        """
        length = tokens.shape[1]
        block = self.config.tokens_per_step
        inputs = bits.shape[1] - block
        visual = self.embed_bits(bits[:, :inputs], xy[:inputs])
        x = jnp.concatenate([self.embed_prefix(tokens), visual], axis=1)
        mask = attention.block_causal_mask(length + inputs, length - block, block)
        hidden, _ = self.read(x, jnp.arange(length + inputs)[None], mask[None])
        states = self.condition(hidden[:, length - block :], xy)
        return hidden[:, :length], rearrange(states, "b (n p) d -> b n p d", p=block)

    def __call__(
        self,
        tokens: Int[Array, "B Q"],
        xy: Int[Array, "T 2"],
        bits: Float[Array, "B T K"],
        noise: Any,
    ) -> tuple[Float[Array, "B N P"], Float[Array, "B Q V"]]:
        """The head's loss of each token, teacher-forced, and the logits of the prefix.

        Args:
          tokens, xy, bits: see `hidden`.
          noise: `Head.training_noise` of every image.
        """
        prefix, states = self.hidden(tokens, xy, bits)
        targets = rearrange(bits, "b (n p) k -> b n p k", p=self.config.tokens_per_step)
        return self.head.loss(states, targets, noise), self.text.logits(prefix)


def sinusoidal_2d(xy: Int[Array, "*B S 2"], dim: int) -> Float[Array, "*B S D"]:
    """The position embedding, float32: dim / 2 features of x, then of y.

    Each half has sines, then cosines, base 10000.
    """
    frequencies = (10000.0 ** -(np.arange(dim // 4) / (dim // 4))).astype(np.float32)
    angles = xy[..., None].astype(jnp.float32) * frequencies
    return rearrange(
        jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1), "... xy d -> ... (xy d)"
    )


class ShownImages(NamedTuple):
    """The visual tokens of all images in a batch of rows, V for each row.

    Attributes:
      bits: in {-1, 1}.
      xy: column and row in the grid of the image's tokens.
      slots: their places in the row; behind its end where a row has fewer than V.
    """

    bits: Float[Array, "R V K"] | Int8[Array, "R V K"] | Int8[np.ndarray, "R V K"]
    xy: Int[Array, "R V 2"] | Int[np.ndarray, "R V 2"]
    slots: Int[Array, "R V"] | Int[np.ndarray, "R V"]


class Prefixes(NamedTuple):
    """The tokens of a batch of rows before the visual ones.

    Attributes:
      tokens: ids; the last P are the first block.
      padding: number of tokens at the start of each row that are padding; their ids are ignored.
      shown: images in the prompts; None: there are none.
    """

    tokens: Int[Array, "R T"] | Int[np.ndarray, "R T"]
    padding: Int[Array, "R"] | Int[np.ndarray, "R"]
    shown: ShownImages | None = None


def check_size(config: TextToImageConfig, height: int, width: int) -> None:
    """Raises a UserError unless images of height x width pixels can be sampled."""
    multiple = config.size_multiple
    largest = config.largest_side
    if any(side <= 0 or side % multiple or side > largest for side in (height, width)):
        raise UserError(
            f"width and height must be multiples of {multiple} up to {largest} pixels, "
            f"got {width}x{height}"
        )


def token_positions(config: TextToImageConfig, height: int, width: int) -> Int[np.ndarray, "T 2"]:
    """(x, y) on the grid of every visual token in sequence order; height and width in pixels."""
    down = config.tokenizer.downsampling
    return order.token_positions(height // down, width // down, config.patch_side, "patch").astype(
        np.int32
    )


def init_params(model: TextToImage, key: Array) -> Params:
    """Initial parameters, float32; stacked if the model scans its layers."""
    config = model.config
    block = config.tokens_per_step
    bits = config.tokenizer.bits
    head = make_head(config.head, bits=bits, tokens_per_step=block)
    noise = jax.tree.map(lambda x: x[None], head.training_noise(jax.random.split(key), 1, 1))
    tokens = jnp.zeros((1, block), jnp.int32)
    xy = jnp.zeros((block, 2), jnp.int32)
    return model.init(key, tokens, xy, jnp.zeros((1, block, bits)), noise)["params"]


def abstract_params(config: TextToImageConfig, scan: bool = True) -> Params:
    """Shapes of the parameters, float32, without computing any.

    Sampling reads all but `text/lm_head`.
    """
    return jax.eval_shape(
        functools.partial(init_params, TextToImage(config, scan)), jax.random.key(0)
    )


class PatchReader:
    """The model with its weights and prompts, for the sampler (`sampling.next_patch.PatchModel`).

    It reads the prompts up to the first block, `<|res_w|>` with the queries, then block by block
    through a key-value cache. One program serves all sizes with as many tokens.
    """

    def __init__(
        self, model: TextToImage, params: Params, prefixes: Prefixes, xy: Int[Array, "T 2"]
    ) -> None:
        """
        Args:
          model: with unrolled layers; `params` likewise, with or without `text/lm_head`.
          prefixes: `prefix_rows` of the B prompts, or with guidance of the B prompts and then B
            times the unconditional one.
          xy: `token_positions`.
        """
        config = model.config
        block = model.config.tokens_per_step
        rows, length = prefixes.tokens.shape
        self._config = config
        self._dtype = jnp.dtype(model.dtype)
        self._xy = xy
        self._bound = model.bind({"params": params})
        # Positions of the cache before the first block, and all of them.
        self._before = length - block
        self._slots = self._before + xy.shape[0]
        self._prompts, first = jnp.split(jnp.asarray(prefixes.tokens), [self._before], axis=1)
        self._shown = prefixes.shown
        self._first_block = self._bound.embed_prefix(first)
        self._positions, self._filled = positions_in_text(prefixes.padding, self._slots)
        self.num_patches = xy.shape[0] // block
        self.patch_shape = (rows, block, config.tokenizer.bits)
        self.head = self._bound.head

    def read_prefix(self) -> list[KVCache] | None:
        x = self._bound.embed_prompts(self._prompts, self._shown)
        return read_causally(self._bound, x, self._positions, self._filled, self._dtype)[1]

    def read(
        self,
        values: Float[Array, "R P K"],
        patch: Int[Array, ""] | int,
        cache: list[KVCache] | None,
    ) -> tuple[Float[Array, "R P C"], list[KVCache] | None]:
        bits = lfq.quantize(values)
        rows, block, _ = self.patch_shape
        start = self._before + patch * block
        last = jax.lax.dynamic_slice_in_dim(self._xy, jnp.maximum(patch - 1, 0) * block, block)
        x = jnp.where(patch == 0, self._first_block, self._bound.embed_bits(bits, last))
        positions = jax.lax.dynamic_slice_in_dim(self._positions, start, block, axis=1)
        visible = self._filled & (jnp.arange(self._slots) < start + block)
        mask = jnp.broadcast_to(visible[:, None], (rows, block, self._slots))
        hidden, cache = self._bound.read(x, positions, mask, cache, start)
        here = jax.lax.dynamic_slice_in_dim(self._xy, patch * block, block)
        return self._bound.condition(hidden, here), cache


def read_causally(
    bound: TextToImage,
    x: Float[Array, "R Q D"],
    positions: Int[Array, "R T"],
    filled: Bool[Array, "R T"],
    dtype: DTypeLike,
) -> tuple[Float[Array, "R _ D"], list[KVCache] | None]:
    """Reads embedded prompts into a new cache of T positions.

    Scores of CHUNK positions are in memory at a time, which matters where prompts show images.

    Args:
      bound: the model with its weights.
      x: of the first Q positions.
      positions: in the text, of every position of the cache.
      filled: whether it is no padding.
      dtype: of the cache.

    Returns:
      Hidden states of the last chunk, and the cache.
    """
    text = bound.config.text
    rows, length, _ = x.shape
    shape = (rows, positions.shape[1], text.num_kv_heads, text.head_dim)
    cache: list[KVCache] | None = [attention.empty_cache(*shape, dtype)] * text.num_layers
    hidden = x
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        mask = attention.block_causal_mask(end, end, 1)[start:] & filled[:, None, :end]
        hidden, cache = bound.read(x[:, start:end], positions[:, start:end], mask, cache, start)
    return hidden, cache


def positions_in_text(
    padding: Int[Array, "R"] | Int[np.ndarray, "R"], slots: int
) -> tuple[Int[Array, "R T"], Bool[Array, "R T"]]:
    """Of every position of the cache, the position in the text, and whether it is no padding."""
    behind = jnp.arange(slots) - jnp.asarray(padding)[:, None]
    return jnp.maximum(behind, 0), behind >= 0
