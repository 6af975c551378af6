"""The training loss of text to image on packed documents (paper 3.3, 4.3).

S is the length of a row, N its patches of P tokens (`data.packing.Row`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from bitdance_jax.config import TextToImageConfig
from bitdance_jax.distributed.constraints import constrain, rows_per_device
from bitdance_jax.heads.make import make_head
from bitdance_jax.models.text_to_image import ShownImages, TextToImage, sinusoidal_2d
from bitdance_jax.nn import linear
from bitdance_jax.nn.packed_attention import PackedMask


Params = Any

LOGITS_CHUNK = 1024
"""Positions on each device whose logits, one for each token of the vocabulary, are in memory at a
time."""


class PackedBatch(NamedTuple):
    """Rows of packed documents as `data.packing.Row`, but with bits in {-1, 1}."""

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    documents: Int[Array, "B S"]
    limits: Int[Array, "B S"]
    labels: Int[Array, "B S"]
    visual: Int[Array, "B N P"]
    conditions: Int[Array, "B N P"]
    bits: Float[Array, "B N P K"]
    xy: Int[Array, "B N P 2"]
    generated: Bool[Array, "B N"]
    area: Int[Array, "B N"]


class Noise(NamedTuple):
    """All random numbers of one training step.

    Attributes:
      flip_u1, flip_u2: uniform; a bit of a generated image flips where u1 < rate * u2.
      head: `Head.training_noise` of every row.
    """

    flip_u1: Float[Array, "B N P K"]
    flip_u2: Float[Array, "B N P K"]
    head: Any


class TokenLosses(NamedTuple):
    """The loss of every token; 0 where there is none.

    Attributes:
      vision: `Head.loss`.
      text: cross-entropy in nats.
    """

    vision: Float[Array, "B N P"]
    text: Float[Array, "B S"]


def sample_noise(keys: Array, config: TextToImageConfig, *, patches: int, repeats: int) -> Noise:
    """The random numbers of one step, from a key for each row.

    Args:
      keys: [B].
      config: of the model.
      patches: N.
      repeats: M, noisy versions of each patch for the head.
    """
    tokens = config.tokens_per_step
    bits = config.tokenizer.bits
    head = make_head(config.head, bits=bits, tokens_per_step=tokens)

    def of_row(key: Array) -> Noise:
        parts = jax.random.split(key, 4)
        first, second = parts[:2]
        return Noise(
            jax.random.uniform(first, (patches, tokens, bits)),
            jax.random.uniform(second, (patches, tokens, bits)),
            head.training_noise(parts[2:], repeats, patches),
        )

    return jax.vmap(of_row)(keys)


def token_losses(
    model: TextToImage,
    params: Params,
    batch: PackedBatch,
    noise: Noise,
    *,
    flip_rate: float = 0.1,
) -> TokenLosses:
    """Losses of rows of packed documents.

    The language model reads the bits of generated images with some of them flipped; the targets are
    clean. Images that are only read are not flipped and have no loss.
    """
    bound = model.bind({"params": params})
    hidden = _read(bound, batch, _flipped(batch, noise, flip_rate))
    vision = _vision_loss(bound, hidden, batch, noise)
    return TokenLosses(vision, _text_loss(bound, hidden, batch.labels))


def counts(batch: PackedBatch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many tokens have a vision loss, and how many a text loss."""
    tokens = batch.visual.shape[-1]
    vision = tokens * jnp.sum(batch.generated)
    return vision.astype(jnp.float32), jnp.sum(batch.labels >= 0).astype(jnp.float32)


def total_loss(
    losses: TokenLosses,
    vision_tokens: Float[Array, ""],
    text_tokens: Float[Array, ""],
    *,
    vision_weight: float = 1.0,
    text_weight: float = 0.01,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of both means, and the means; a mean over no tokens is 0.

    Args:
      losses: of some rows of the batch or of all.
      vision_tokens, text_tokens: `counts` of the complete batch, so that neither packing nor the
        number of devices matters; for some of its rows, their share of the batch's rows of that.
        Then the mean over micro-batches is the result of the complete batch.
      vision_weight, text_weight: of the means.
    """
    vision = _mean(losses.vision, vision_tokens)
    text = _mean(losses.text, text_tokens)
    total = vision_weight * vision + text_weight * text
    return total, {"vision_loss": vision, "text_loss": text}


def _mean(losses: Array, count: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.sum(losses) / jnp.where(count > 0, count, 1.0)


def _flipped(batch: PackedBatch, noise: Noise, rate: float) -> Float[Array, "B N P K"]:
    flips = (noise.flip_u1 < rate * noise.flip_u2) & batch.generated[..., None, None]
    return jnp.where(flips, -batch.bits, batch.bits)


def _read(
    bound: TextToImage, batch: PackedBatch, bits: Float[Array, "B N P K"]
) -> Float[Array, "B S D"]:
    """Hidden states of all positions, after the final norm."""
    shown = ShownImages(
        rearrange(bits, "b n p k -> b (n p) k"),
        rearrange(batch.xy, "b n p c -> b (n p) c"),
        # Patches that are not used have the slot S and are dropped.
        rearrange(batch.visual, "b n p -> b (n p)"),
    )
    x = bound.embed_prompts(batch.tokens, shown)
    mask = PackedMask(batch.documents, batch.limits)
    return bound.read(x, batch.positions, mask)[0]


def _vision_loss(
    bound: TextToImage, hidden: Float[Array, "B S D"], batch: PackedBatch, noise: Noise
) -> Float[Array, "B N P"]:
    states = jax.vmap(lambda row, slots: row.at[slots].get(mode="fill", fill_value=0))(
        hidden, batch.conditions
    )
    states = constrain(states, "batch", None, None, None)
    states = states + sinusoidal_2d(batch.xy, bound.config.text.dim).astype(states.dtype)
    losses = bound.head.loss(states, batch.bits, noise.head)
    return jnp.where(batch.generated[..., None], losses, 0.0)


def _text_loss(
    bound: TextToImage, hidden: Float[Array, "B S D"], labels: Int[Array, "B S"]
) -> Float[Array, "B S"]:
    """Cross-entropy of each position that has a label.

    Every row is cut into chunks, so that each device computes those of its own rows, and the output
    layer's kernel is gathered once for all chunks.
    """
    length = labels.shape[1]
    chunk = min(max(1, LOGITS_CHUNK // rows_per_device(len(labels))), length)
    padding = -length % chunk
    kernel = linear.gathered_kernel(bound.text.lm_head)

    @jax.checkpoint
    def chunk_loss(chunk: tuple[Array, Array]) -> Float[Array, "B C"]:
        states, labels = chunk
        logits = linear.product(states.astype(bound.dtype), kernel).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - chosen
        return jnp.where(labels >= 0, losses, 0.0)

    states = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    padded = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=-1)
    chunks = (
        rearrange(states, "b (n c) d -> n b c d", c=chunk),
        rearrange(padded, "b (n c) -> n b c", c=chunk),
    )
    losses = jax.lax.map(chunk_loss, chunks)
    return rearrange(losses, "n b c -> b (n c)")[:, :length]
