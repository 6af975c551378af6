"""Class-conditional BitDance (paper 3, 4.2): the transformer reads class, queries and bits; the head draws the next patch.

The sequence is `class_tokens` tokens of the label, P - 1 learned queries, then the visual tokens except the last P; its last h w outputs
stand for the visual tokens, patch by patch.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bitdance_jax.config import ClassConditionalConfig, SamplerConfig
from bitdance_jax.flow_head import objective
from bitdance_jax.flow_head.head import FlowHead
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.next_patch import Drawing
from bitdance_jax.sharding import constrain
from bitdance_jax.tokenizer import lfq
from bitdance_jax.transformer import attention, order, rope
from bitdance_jax.transformer.attention import KVCache
from bitdance_jax.transformer.block_causal import BlockCausalTransformer, Rotary
from bitdance_jax.transformer.layers import SwiGLU, residual_dtype


Params = Any


class ClassConditional(nn.Module):
    """The parameters and the two halves of the model; the functions below put them together.

    Attributes:
      config: sizes.
      scan: stacked parameters and scanned layers (training), or unrolled (sampling).
      remat: what the backward pass keeps (`transformer.stack.remat_policy`).
      dtype: compute type.
      kernel: the transformer's attention kernel.
    """

    config: ClassConditionalConfig
    scan: bool = False
    remat: str | None = None
    dtype: DTypeLike = jnp.float32
    kernel: attention.Kernel = "xla"

    def setup(self) -> None:
        config, dim = self.config, self.config.transformer.dim
        init = nn.initializers.normal(0.02)
        self._residual = residual_dtype(config.transformer.residual_dtype, self.dtype)
        self.class_embedding = nn.Embed(config.num_classes + 1, config.class_tokens * dim, embedding_init=init)
        if config.tokens_per_step > 1:
            self.query_tokens = self.param("query_tokens", init, (config.tokens_per_step - 1, dim))
        self.connector = SwiGLU(int(1.5 * dim), dim, use_bias=True, dtype=self.dtype)
        self.transformer = BlockCausalTransformer(config.transformer, self.scan, self.remat, self.dtype, self.kernel)
        self.position_embedding = self.param("position_embedding", init, (config.num_tokens, dim))
        self.head = FlowHead(
            config.head,
            config.tokenizer.bits,
            config.tokens_per_step,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
        )

    def embed_prefix(self, labels: Int[Array, "B"]) -> Float[Array, "B S D"]:
        """Class and query tokens, S = class_tokens + P - 1. The label `num_classes` is the unconditional one."""
        config = self.config
        tokens = self.class_embedding(labels).astype(self._residual)
        tokens = rearrange(tokens, "b (s d) -> b s d", s=config.class_tokens)
        if config.tokens_per_step == 1:
            return tokens
        queries = repeat(self.query_tokens.astype(tokens.dtype), "s d -> b s d", b=tokens.shape[0])
        return jnp.concatenate([tokens, queries], axis=1)

    def embed_bits(self, bits: Float[Array, "B S K"]) -> Float[Array, "B S D"]:
        return self.connector(bits).astype(self._residual)

    def read(
        self,
        x: Float[Array, "B S D"],
        rotary: Rotary,
        mask: Any,
        cache: list[KVCache] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B S D"], list[KVCache] | None]:
        return self.transformer(x, rotary, mask, cache, start)

    def condition(self, hidden: Float[Array, "B S D"], start: Int[Array, ""] | int = 0) -> Float[Array, "B S D"]:
        """The head's condition for S visual tokens from number `start` on: hidden state plus learned position."""
        position = jax.lax.dynamic_slice_in_dim(self.position_embedding, start, hidden.shape[1])
        return hidden + position.astype(hidden.dtype)

    def hidden(self, labels: Int[Array, "B"], bits: Float[Array, "B T K"]) -> Float[Array, "B T D"]:
        """The transformer's outputs for all visual tokens, bits in sequence order, before the position embedding."""
        config = self.config
        x = jnp.concatenate([self.embed_prefix(labels), self.embed_bits(bits[:, : config.num_tokens - config.tokens_per_step])], axis=1)
        length = x.shape[1]
        # cuDNN takes even lengths: one token more, which no other sees, costs less than padding in
        # every layer.
        padded = length + (length % 2 if self.kernel == "cudnn" else 0)
        x = jnp.pad(x, ((0, 0), (0, padded - length), (0, 0)))
        cos, sin = rotary(config)
        hidden, _ = self.read(x, (cos[:padded], sin[:padded]), attention_rule(config))
        return hidden[:, length - config.num_tokens : length]

    def __call__(
        self, labels: Int[Array, "B"], bits: Float[Array, "B T K"], x_t: Float[Array, "B R N P K"], t: Float[Array, "B R N"]
    ) -> Float[Array, "B R N P K"]:
        """Teacher-forced prediction of the clean bits of every image's N patches, from R noisy versions of each."""
        z = to_patches(self.condition(self.hidden(labels, bits)), self.config)
        condition = constrain(repeat(self.head.embed_condition(z), "b n p d -> (b r n) p d", r=x_t.shape[1]), "batch", None, None)
        time = constrain(rearrange(self.head.embed_time(t), "b r n d -> (b r n) 1 d"), "batch", None, None)
        predicted = self.head.denoise(rearrange(x_t, "b r n p k -> (b r n) p k"), time, condition)
        return predicted.reshape(x_t.shape)


def rotary(config: ClassConditionalConfig) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosines and sines of the prefix, which is unrotated, and all visual tokens, at (x + 1.5, y + 1.5); half = head_dim / 2."""
    head_dim = config.transformer.head_dim
    xy = order.token_positions(config.grid, config.grid, config.patch_side, config.order) + 1.5
    angles = rope.rotary_angles_2d(xy.astype(np.float32), head_dim, config.transformer.rope_base)
    prefix = np.zeros((config.class_tokens + config.tokens_per_step - 1, head_dim // 2), np.float32)
    angles = np.concatenate([prefix, angles])
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


def attention_rule(config: ClassConditionalConfig) -> attention.BlockCausal:
    """Who sees whom; the first block is the last class token with the queries (paper 3.3)."""
    block = config.tokens_per_step if config.mask == "block_causal" else 1
    return attention.BlockCausal(config.class_tokens - 1, block)


def attention_mask(config: ClassConditionalConfig) -> np.ndarray:
    """`attention_rule` of all tokens, bool [S + T, S + T]."""
    total = config.class_tokens + config.tokens_per_step - 1 + config.num_tokens
    return attention_rule(config).array(total)


def to_patches(tokens: Float[Array, "B T C"], config: ClassConditionalConfig) -> Float[Array, "B N P C"]:
    return rearrange(tokens, "b (n p) c -> b n p c", p=config.tokens_per_step)


class Draws(NamedTuple):
    """Every random number of one training step; R is `head_repeats`, N the patches of an image.

    Attributes:
      flip_u1, flip_u2: uniform; a bit flips where u1 < rate * u2.
      label_drop: uniform; a label is dropped where it is below the rate.
      time_normal, noise: standard normal, for the head's times and noisy bits.
    """

    flip_u1: Float[Array, "B T K"]
    flip_u2: Float[Array, "B T K"]
    label_drop: Float[Array, "B"]
    time_normal: Float[Array, "B R N"]
    noise: Float[Array, "B R N P K"]


def draw(keys: Array, config: ClassConditionalConfig) -> Draws:
    """The draws of one step from one key for each image: they do not depend on how a batch is split over devices or in time."""
    bits = (config.num_tokens, config.tokenizer.bits)
    patches = (config.head_repeats, config.num_steps)

    def of_image(key: Array) -> Draws:
        first, second, drop, time, noise = jax.random.split(key, 5)
        return Draws(
            jax.random.uniform(first, bits),
            jax.random.uniform(second, bits),
            jax.random.uniform(drop, ()),
            jax.random.normal(time, patches),
            jax.random.normal(noise, (*patches, config.tokens_per_step, config.tokenizer.bits)),
        )

    return jax.vmap(of_image)(keys)


def class_conditional_loss(
    model: ClassConditional, params: Params, labels: Int[Array, "B"], codes: Float[Array, "B h w K"], draws: Draws
) -> Float[Array, ""]:
    """Mean velocity loss of the head over all patches, each with `head_repeats` fresh times and noises (SPEC 3, 4).

    Args:
      labels: 0 ... num_classes - 1; some are dropped to `num_classes`.
      codes: in {-1, 1}. The transformer reads them with some bits flipped; the targets are clean.
      draws: `draw`.
    """
    config = model.config
    target = order.grid_to_sequence(codes, config.patch_side, config.order)
    flipped = draws.flip_u1 < config.bit_flip_rate * draws.flip_u2
    labels = jnp.where(draws.label_drop < config.label_drop_rate, config.num_classes, labels)
    clean = to_patches(target, config)[:, None]
    t = objective.training_times(draws.time_normal, config.head)
    x_t = objective.interpolate(clean, draws.noise, t)
    predicted: Any = model.apply({"params": params}, labels, jnp.where(flipped, -target, target), x_t, t)
    return jnp.mean(objective.velocity_loss(predicted, clean, t))


def init_params(model: ClassConditional, key: Array) -> Params:
    """Fresh parameters, float32; stacked or not as the model says."""
    config, patch = model.config, (model.config.num_steps, model.config.tokens_per_step, model.config.tokenizer.bits)
    bits = jnp.zeros((1, config.num_tokens, config.tokenizer.bits))
    return model.init(key, jnp.zeros((1,), jnp.int32), bits, jnp.zeros((1, 1, *patch)), jnp.zeros((1, 1, patch[0])))["params"]


def abstract_params(config: ClassConditionalConfig, scan: bool = True) -> Params:
    """Shapes of the parameters, float32, without making any."""
    return jax.eval_shape(functools.partial(init_params, ClassConditional(config, scan)), jax.random.key(0))


def sample_codes(
    model: ClassConditional,
    params: Params,
    labels: Int[Array, "B"],
    noise: next_patch.NoiseSource,
    sampler: SamplerConfig,
) -> Float[Array, "B h w K"]:
    """Codes in {-1, 1} of one image for each label; `order.sequence_to_grid` of the signs of `sample_patches`.

    Args:
      model: with unrolled layers; `params` likewise.
      labels: 0 ... num_classes.
      noise: for example `next_patch.noise_from_keys`.
    """
    values = sample_values(model, params, labels, noise, sampler)
    tokens = rearrange(lfq.quantize(values), "n b p k -> b (n p) k")
    return order.sequence_to_grid(tokens, model.config.grid, model.config.patch_side, model.config.order)


def sample_values(
    model: ClassConditional,
    params: Params,
    labels: Int[Array, "B"],
    noise: next_patch.NoiseSource,
    sampler: SamplerConfig,
) -> Float[Array, "N B P K"]:
    """The sampler's values before the sign, patch by patch."""
    states, cache = _read_prefix(model, params, labels, sampler)
    return next_patch.sample_patches(_patches(model, params), states, cache, model.config.num_steps, noise, sampler)


def begin(
    model: ClassConditional,
    params: Params,
    labels: Int[Array, "B"],
    noise: next_patch.NoiseSource,
    sampler: SamplerConfig,
) -> Drawing:
    """`sample_codes` as far as the first patch; `advance` goes on, and both together draw the same."""
    states, cache = _read_prefix(model, params, labels, sampler)
    return next_patch.begin(_patches(model, params), states, cache, model.config.num_steps, noise, sampler)


def advance(
    model: ClassConditional,
    params: Params,
    drawing: Drawing,
    noise: next_patch.NoiseSource,
    sampler: SamplerConfig,
    stop: Int[Array, ""] | int,
) -> Drawing:
    """Draws on until `stop` patches are drawn, however many those are: one program."""
    return next_patch.advance(_patches(model, params), drawing, noise, sampler, stop)


def _read_prefix(
    model: ClassConditional, params: Params, labels: Int[Array, "B"], sampler: SamplerConfig
) -> tuple[Float[Array, "R P C"], Any]:
    """States of the first patch, and the cache."""
    config, transformer = model.config, model.config.transformer
    bound = model.bind({"params": params})
    if sampler.guidance_scale != 1:
        labels = jnp.concatenate([labels, jnp.full_like(labels, config.num_classes)])
    prefix, length = config.class_tokens + config.tokens_per_step - 1, config.tokens_per_step
    total = prefix + config.num_tokens - length
    cos, sin = rotary(config)
    mask = jnp.asarray(attention_mask(config)[:prefix, :prefix])
    empty = attention.empty_cache(labels.shape[0], total, transformer.num_heads, transformer.head_dim, jnp.dtype(model.dtype))
    hidden, cache = bound.read(bound.embed_prefix(labels), (cos[:prefix], sin[:prefix]), mask, [empty] * transformer.num_layers)
    return bound.condition(hidden[:, -length:]), cache


def _patches(model: ClassConditional, params: Params) -> next_patch.Model:
    """The model as the sampler takes it, after the prefix."""
    config = model.config
    bound = model.bind({"params": params})
    prefix, length = config.class_tokens + config.tokens_per_step - 1, config.tokens_per_step
    total = prefix + config.num_tokens - length
    cos, sin = rotary(config)
    mask = jnp.asarray(attention_mask(config)[:total, :total])

    def read(
        bits: Float[Array, "R P K"], patch: Int[Array, ""], cache: list[KVCache] | None
    ) -> tuple[Float[Array, "R P C"], list[KVCache] | None]:
        start = prefix + patch * length
        angles = jax.lax.dynamic_slice_in_dim(cos, start, length), jax.lax.dynamic_slice_in_dim(sin, start, length)
        visible = jax.lax.dynamic_slice_in_dim(mask, start, length)
        hidden, cache = bound.read(bound.embed_bits(bits), angles, visible, cache, start)
        return bound.condition(hidden, (patch + 1) * length), cache

    head = bound.head
    return next_patch.Model(read, head.embed_time, head.embed_condition, head.modulation, head.predict, config.head.time_shift)
