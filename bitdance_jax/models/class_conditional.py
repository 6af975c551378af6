"""Class-conditional BitDance (paper 3, 4.2).

The transformer reads a sequence of `class_tokens` tokens of the label, P - 1 learned queries, and
the visual tokens except the last P. The last h w outputs, patch by patch, are what the head
predicts the visual tokens from.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from bitdance_jax.config import ClassConditionalConfig
from bitdance_jax.heads.make import make_head
from bitdance_jax.nn import attention, rope
from bitdance_jax.nn.attention import KVCache
from bitdance_jax.nn.block import Rotary
from bitdance_jax.nn.layers import SwiGLU, residual_dtype
from bitdance_jax.tokenizer.codes import to_latents
from bitdance_jax.transformer import order
from bitdance_jax.transformer.block_causal import BlockCausalTransformer


Params = Any


class ClassConditional(nn.Module):
    """Transformer and head with their embeddings.

    Attributes:
      config: sizes.
      scan: stacked parameters and scanned layers (training), or unrolled (sampling).
      remat: what the backward pass stores (`nn.stack.remat_policy`).
      dtype: compute type.
      kernel: the transformer's attention kernel.
    """

    config: ClassConditionalConfig
    scan: bool = False
    remat: str | None = None
    dtype: DTypeLike = jnp.float32
    kernel: attention.Kernel = "xla"

    def setup(self) -> None:
        config = self.config
        dim = self.config.transformer.dim
        init = nn.initializers.normal(0.02)
        self._residual = residual_dtype(config.transformer.residual_dtype, self.dtype)
        self.class_embedding = nn.Embed(
            config.num_classes + 1, config.class_tokens * dim, embedding_init=init
        )
        if config.tokens_per_step > 1:
            self.query_tokens = self.param("query_tokens", init, (config.tokens_per_step - 1, dim))
        self.connector = SwiGLU(int(1.5 * dim), dim, use_bias=True, dtype=self.dtype)
        self.transformer = BlockCausalTransformer(
            config.transformer, self.scan, self.remat, self.dtype, self.kernel
        )
        self.position_embedding = self.param("position_embedding", init, (config.num_tokens, dim))
        self.head = make_head(
            config.head,
            bits=config.tokenizer.bits,
            tokens_per_step=config.tokens_per_step,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
        )

    def embed_prefix(self, labels: Int[Array, "B"]) -> Float[Array, "B Q D"]:
        """Class and query tokens, Q = class_tokens + P - 1.

        The label `num_classes` is the unconditional one.
        """
        config = self.config
        tokens = self.class_embedding(labels).astype(self._residual)
        tokens = rearrange(tokens, "b (s d) -> b s d", s=config.class_tokens)
        if config.tokens_per_step == 1:
            return tokens
        queries = repeat(self.query_tokens.astype(tokens.dtype), "s d -> b s d", b=tokens.shape[0])
        return jnp.concatenate([tokens, queries], axis=1)

    def embed_bits(self, bits: Float[Array, "B Q K"]) -> Float[Array, "B Q D"]:
        return self.connector(bits).astype(self._residual)

    def read(
        self,
        x: Float[Array, "B Q D"],
        rotary: Rotary,
        mask: Any,
        cache: list[KVCache] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B Q D"], list[KVCache] | None]:
        return self.transformer(x, rotary, mask, cache, start)

    def condition(
        self, hidden: Float[Array, "B Q D"], start: Int[Array, ""] | int = 0
    ) -> Float[Array, "B Q D"]:
        """What the head reads for Q visual tokens from `start` on: state plus position."""
        position = jax.lax.dynamic_slice_in_dim(self.position_embedding, start, hidden.shape[1])
        return hidden + position.astype(hidden.dtype)

    def hidden(self, labels: Int[Array, "B"], bits: Float[Array, "B T K"]) -> Float[Array, "B T D"]:
        """The transformer's outputs for all visual tokens, before the position embedding.

        Args:
          labels: 0 ... num_classes.
          bits: in {-1, 1}, in sequence order.
        """
        config = self.config
        x = jnp.concatenate(
            [
                self.embed_prefix(labels),
                self.embed_bits(bits[:, : config.num_tokens - config.tokens_per_step]),
            ],
            axis=1,
        )
        length = x.shape[1]
        # cuDNN takes even lengths. One more token, which no other token sees, costs less than
        # padding in every layer.
        padded = length + (length % 2 if self.kernel == "cudnn" else 0)
        x = jnp.pad(x, ((0, 0), (0, padded - length), (0, 0)))
        cos, sin = rotary(config)
        hidden, _ = self.read(x, (cos[:padded], sin[:padded]), attention_rule(config))
        return hidden[:, length - config.num_tokens : length]

    def states(
        self, labels: Int[Array, "B"], bits: Float[Array, "B T K"]
    ) -> Float[Array, "B N P D"]:
        """What the head reads at every patch, teacher-forced on bits in sequence order."""
        return to_patches(self.condition(self.hidden(labels, bits)), self.config)

    def __call__(
        self,
        labels: Int[Array, "B"],
        bits: Float[Array, "B T K"],
        targets: Float[Array, "B N P K"],
        noise: Any,
    ) -> Float[Array, "B N P"]:
        """The head's loss of each token, teacher-forced.

        Args:
          labels: 0 ... num_classes.
          bits: in {-1, 1}, in sequence order, as the transformer reads them.
          targets: the bits to predict.
          noise: `Head.training_noise` of every image.
        """
        return self.head.loss(self.states(labels, bits), targets, noise)


def rotary(config: ClassConditionalConfig) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosines and sines of the prefix and all visual tokens; half = head_dim / 2.

    The prefix is not rotated; visual tokens are at (x + 1.5, y + 1.5).
    """
    head_dim = config.transformer.head_dim
    xy = order.token_positions(config.grid, config.grid, config.patch_side, config.order) + 1.5
    angles = rope.rotary_angles_2d(xy.astype(np.float32), head_dim, config.transformer.rope_base)
    prefix = np.zeros((config.class_tokens + config.tokens_per_step - 1, head_dim // 2), np.float32)
    angles = np.concatenate([prefix, angles])
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


def attention_rule(config: ClassConditionalConfig) -> attention.BlockCausal:
    """The attention mask (paper 3.3); the first block is the last class token with the queries."""
    block = config.tokens_per_step if config.mask == "block_causal" else 1
    return attention.BlockCausal(config.class_tokens - 1, block)


def to_patches(
    tokens: Float[Array, "B T C"], config: ClassConditionalConfig
) -> Float[Array, "B N P C"]:
    return rearrange(tokens, "b (n p) c -> b n p c", p=config.tokens_per_step)


class TrainingNoise(NamedTuple):
    """Every random number of one training step.

    Attributes:
      flip_u1, flip_u2: uniform; a bit flips where u1 < rate * u2.
      label_drop: uniform; a label is dropped where it is below the rate.
      head: `Head.training_noise`.
    """

    flip_u1: Float[Array, "B T K"]
    flip_u2: Float[Array, "B T K"]
    label_drop: Float[Array, "B"]
    head: Any


def training_noise(keys: Key[Array, "B"], config: ClassConditionalConfig) -> TrainingNoise:
    """The random numbers of one step from one key for each image.

    They do not depend on how a batch is split over devices or micro-batches.
    """
    bits = (config.num_tokens, config.tokenizer.bits)
    head = make_head(config.head, bits=bits[1], tokens_per_step=config.tokens_per_step)

    def of_image(key: Array) -> TrainingNoise:
        parts = jax.random.split(key, 5)
        first, second, drop = parts[:3]
        return TrainingNoise(
            jax.random.uniform(first, bits),
            jax.random.uniform(second, bits),
            jax.random.uniform(drop, ()),
            head.training_noise(parts[3:], config.head_repeats, config.num_steps),
        )

    return jax.vmap(of_image)(keys)


def class_conditional_loss(
    model: ClassConditional,
    params: Params,
    labels: Int[Array, "B"],
    codes: Float[Array, "B h w K"],
    noise: TrainingNoise,
) -> Float[Array, ""]:
    """Mean loss of the head over all tokens (paper 3.2, 3.3).

    Args:
      model: see there.
      params: its parameters.
      labels: 0 ... num_classes - 1; some are dropped to `num_classes`.
      codes: in {-1, 1}, or continuous latents. The transformer reads them with some bits flipped;
        the targets are clean.
      noise: `training_noise`.
    """
    config = model.config
    target = order.grid_to_sequence(codes, config.patch_side, config.order)
    flipped = noise.flip_u1 < config.bit_flip_rate * noise.flip_u2
    flipped &= config.tokenizer.latents == "bits"
    labels = jnp.where(noise.label_drop < config.label_drop_rate, config.num_classes, labels)
    read = jnp.where(flipped, -target, target)
    losses: Any = model.apply(
        {"params": params}, labels, read, to_patches(target, config), noise.head
    )
    return jnp.mean(losses)


def init_params(model: ClassConditional, key: Array) -> Params:
    """Initial parameters, float32; stacked if the model scans its layers."""
    config = model.config
    bits = jnp.zeros((1, config.num_tokens, config.tokenizer.bits))
    noise = training_noise(key[None], config).head
    labels = jnp.zeros((1,), jnp.int32)
    return model.init(key, labels, bits, to_patches(bits, config), noise)["params"]


def abstract_params(config: ClassConditionalConfig, scan: bool = True) -> Params:
    """Shapes of the parameters, float32, without computing any."""
    return jax.eval_shape(
        functools.partial(init_params, ClassConditional(config, scan)), jax.random.key(0)
    )


class PatchReader:
    """The model with its weights and labels, for the sampler (`sampling.next_patch.PatchModel`).

    It reads the prefix up to the first block, the last class token with the queries, then block by
    block through a key-value cache.
    """

    def __init__(self, model: ClassConditional, params: Params, labels: Int[Array, "R"]) -> None:
        """
        Args:
          model: with unrolled layers; `params` likewise.
          labels: of every row, 0 ... num_classes; `num_classes` is the unconditional one.
        """
        config = model.config
        self._config = config
        self._dtype = jnp.dtype(model.dtype)
        self._bound = model.bind({"params": params})
        # Positions of the cache before the first block, and all of them.
        self._before = config.class_tokens - 1
        prefix = self._bound.embed_prefix(labels)
        self._class_tokens, self._first_block = jnp.split(prefix, [self._before], axis=1)
        self._slots = self._before + config.num_tokens
        if model.kernel == "cudnn":  # An odd cache would be copied, padded, at every patch.
            self._slots += self._slots % 2
        self._rotary = rotary(config)
        self._mask = jnp.asarray(attention_rule(config).array(self._slots))
        self.num_patches = config.num_steps
        self.patch_shape = (labels.shape[0], config.tokens_per_step, config.tokenizer.bits)
        self.head = self._bound.head

    def read_prefix(self) -> list[KVCache] | None:
        sizes = self._config.transformer
        before = self._before
        shape = (self.patch_shape[0], self._slots, sizes.num_heads, sizes.head_dim)
        empty = [attention.empty_cache(*shape, self._dtype)] * sizes.num_layers
        if not before:
            return empty
        angles = self._angles(0, before)
        mask = self._mask[:before, :before]
        _, cache = self._bound.read(self._class_tokens, angles, mask, empty)
        return cache

    def read(
        self,
        values: Float[Array, "R P K"],
        patch: Int[Array, ""] | int,
        cache: list[KVCache] | None,
    ) -> tuple[Float[Array, "R P C"], list[KVCache] | None]:
        bits = to_latents(values, self._config.tokenizer.latents)
        length = self._config.tokens_per_step
        start = self._before + patch * length
        x = jnp.where(patch == 0, self._first_block, self._bound.embed_bits(bits))
        visible = jax.lax.dynamic_slice_in_dim(self._mask, start, length)
        hidden, cache = self._bound.read(x, self._angles(start, length), visible, cache, start)
        return self._bound.condition(hidden, patch * length), cache

    def _angles(self, start: Int[Array, ""] | int, length: int) -> Rotary:
        cos, sin = (jax.lax.dynamic_slice_in_dim(table, start, length) for table in self._rotary)
        return cos, sin


def with_unconditional(
    labels: Int[Array, "labels"], config: ClassConditionalConfig, images: int
) -> Int[Array, "R"]:
    """Labels of the rows that guidance takes: conditional ones, then an unconditional one for each
    image.
    """
    unconditional = jnp.full_like(labels[:images], config.num_classes)
    return jnp.concatenate([labels, unconditional])


def values_to_codes(
    values: Float[Array, "N B P K"], config: ClassConditionalConfig
) -> Float[Array, "B h w K"]:
    """The sampler's values to codes in {-1, 1}, or continuous latents, on the grid."""
    latents = to_latents(values, config.tokenizer.latents)
    tokens = rearrange(latents, "n b p k -> b (n p) k")
    return order.sequence_to_grid(tokens, config.grid, config.patch_side, config.order)
