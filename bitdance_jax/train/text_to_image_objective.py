"""What a step of text-to-image training computes (paper sections 3.3 and 4.3)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bitdance_jax.convert import peft
from bitdance_jax.data.packed_batches import max_patches
from bitdance_jax.models.text_to_image import TextToImage, init_params
from bitdance_jax.models.text_to_image_loss import (
    PackedBatch,
    TokenLosses,
    counts,
    sample_noise,
    token_losses,
    total_loss,
)
from bitdance_jax.nn import lora
from bitdance_jax.nn.attention import choose_kernel
from bitdance_jax.tokenizer.codes import unpack
from bitdance_jax.train import freezing
from bitdance_jax.train.task import Batch, Metrics, Objective, Params
from bitdance_jax.train.text_to_image_config import AROUND_IMAGE, TextToImageSettings


SHARES = ("vision_tokens", "text_tokens")
"""What `TextToImageObjective.prepare` adds: each row's share of the batch's counts of tokens."""


COUNTED_PROMPT = 64
"""Tokens of a prompt with its template where operations are counted."""


def visible_pairs(length: int, image: int, block: int) -> float:
    """Pairs of a query and a key that it sees, in the document of a prompt and an image.

    Args:
      length: of the document.
      image: tokens of the image.
      block: P.
    """
    return length * (length + 1) / 2 + (image + block) * (block - 1) / 2


class TextToImageObjective(Objective):
    """Vision loss and text loss of packed documents, each a mean over its own tokens of the
    complete batch."""

    def __init__(self, config: TextToImageSettings) -> None:
        self._config = config
        self._row = config.data.packing.row
        run = config.run
        dtype = jnp.dtype(run.compute_dtype)
        remat = None if run.remat == "none" else run.remat
        kernel = choose_kernel(run.attention, dtype)
        self._model = TextToImage(config.model, scan=True, remat=remat, dtype=dtype, kernel=kernel)
        abstract = jax.eval_shape(self._init_all, jax.random.key(0))
        freezing.check_patterns(abstract, config.freeze)
        _, self._abstract_frozen = freezing.split(abstract, config.freeze)
        if config.lora.rank:
            self._adapted = peft.adapted(config.model, config.lora)
            self._abstract_frozen = abstract

    def init(self, key: jax.Array) -> Params:
        if rank := self._config.lora.rank:
            return lora.initial(self._adapted, rank, key)
        return freezing.split(self._init_all(key), self._config.freeze)[0]

    def all_params(self, params: Params, frozen: Params) -> Params:
        """Those of the model, with its adapters beside them."""
        settings = self._config.lora
        if settings.rank:
            return lora.attached(frozen, params, settings.scale)
        return freezing.merge(params, frozen)

    def _init_all(self, key: jax.Array) -> Params:
        return init_params(self._model, key)

    def prepare(self, batch: Batch) -> Batch:
        rows = len(batch["tokens"])
        shares = [jnp.full(rows, count / rows) for count in counts(self._packed(batch))]
        # Every patch is 1 / number of patches of its image.
        share = self._config.model.tokens_per_step / batch["area"]
        images = jnp.einsum("bn,bnr->r", share, self._by_resolution(batch))
        totals = {
            "images": jnp.tile(images, (rows, 1)),
            "sources": jnp.tile(jnp.sum(batch["sources"], axis=0), (rows, 1)),
        }
        return batch | dict(zip(SHARES, shares, strict=True)) | totals

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        loss, parts, _ = self._losses(params, frozen, batch, keys)
        filled = jnp.mean((batch["documents"] >= 0).astype(jnp.float32))
        return loss, {**parts, **self._drawn(batch), "filled": filled}

    def _drawn(self, batch: Batch) -> Metrics:
        """Generated images of the complete batch, also by resolution, and documents by source."""
        data = self._config.data
        images = jnp.mean(batch["images"], axis=0)
        documents = jnp.mean(batch["sources"].astype(jnp.float32), axis=0)
        drawn = {"images": jnp.sum(images)}
        if len(data.resolutions) > 1:
            names = (f"images_{resolution}" for resolution in self._areas())
            drawn |= dict(zip(names, images, strict=True))
        if len(data.source_names) > 1:
            names = (f"documents_{name}" for name in data.source_names)
            drawn |= dict(zip(names, documents, strict=True))
        return drawn

    def evaluate(self, params: Params, frozen: Params, batch: Batch, keys: jax.Array) -> Metrics:
        loss, parts, losses = self._losses(params, frozen, batch, keys)
        chosen = self._by_resolution(batch)
        sums = jnp.einsum("bnp,bnr->br", losses.vision, chosen)
        tokens = self._config.model.tokens_per_step * jnp.sum(chosen, axis=1)
        return {"loss": loss, **parts, "sums": sums, "tokens": tokens}

    def summarize(self, features: dict[str, np.ndarray]) -> dict[str, float]:
        """The vision loss of each resolution that was seen."""
        sums, tokens = (features[name].sum(axis=0, dtype=np.float64) for name in ("sums", "tokens"))
        return {
            f"vision_loss_{resolution}": float(sums[number] / tokens[number])
            for number, resolution in enumerate(self._areas())
            if tokens[number]
        }

    def abstract_batch(self, batch_size: int) -> Batch:
        model = self._config.model
        block = model.tokens_per_step
        patches = max_patches(self._row, block)
        per_row = {
            **dict.fromkeys(
                ("tokens", "positions", "documents", "limits", "labels"),
                ((self._row,), jnp.int32),
            ),
            **dict.fromkeys(("visual", "conditions"), ((patches, block), jnp.int32)),
            "bits": ((patches, block, -(-model.tokenizer.bits // 8)), jnp.uint8),
            "xy": ((patches, block, 2), jnp.int32),
            "generated": ((patches,), jnp.bool_),
            "area": ((patches,), jnp.int32),
            "sources": ((len(self._config.data.source_names),), jnp.int32),
        }
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
            for name, (shape, dtype) in per_row.items()
        }

    def abstract_frozen(self) -> Params:
        """The weights of `freeze`, or all under adapters, in the compute type."""
        dtype = self._model.dtype
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), self._abstract_frozen)

    def counted(self) -> "tuple[TextToImageObjective, float]":
        """In rows as long as the number of keys that a position sees on average, in documents of a
        prompt of COUNTED_PROMPT tokens and a square image, whose resolutions are as drawn."""
        data, block = self._config.data, self._config.model.tokens_per_step
        shares = dict(zip(data.resolutions, data.resolution_shares, strict=True))
        pairs = positions = 0.0
        for resolution, area in self._areas().items():
            image = round(area)
            length = COUNTED_PROMPT + AROUND_IMAGE + block + image
            positions += shares[resolution] * length
            pairs += shares[resolution] * visible_pairs(length, image, block)
        run = dataclasses.replace(self._config.run, attention="xla")
        counted = type(self)(dataclasses.replace(self._config, run=run))
        counted._row = max(round(pairs / positions / block), 1) * block
        return counted, self._row / counted._row

    def _losses(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, Metrics, TokenLosses]:
        config = self._config
        packed = self._packed(batch)
        noise = sample_noise(
            keys, config.model, patches=packed.visual.shape[1], repeats=config.head_repeats
        )
        losses = token_losses(
            self._model,
            self.all_params(params, frozen),
            packed,
            noise,
            flip_rate=config.flip_rate,
        )
        loss, parts = total_loss(
            losses,
            *(jnp.sum(batch[name]) for name in SHARES),
            vision_weight=config.vision_weight,
            text_weight=config.text_weight,
        )
        return loss, parts, losses

    def _packed(self, batch: Batch) -> PackedBatch:
        arrays = {name: batch[name] for name in PackedBatch._fields}
        arrays["bits"] = unpack(batch["bits"], self._config.model.tokenizer)
        return PackedBatch(**arrays)

    def _by_resolution(self, batch: Batch) -> Float[jax.Array, "B N resolutions"]:
        """1 for a generated patch and the resolution whose area is nearest to its image's."""
        areas = jnp.array(list(self._areas().values()))
        nearest = jnp.argmin(jnp.abs(jnp.log(batch["area"][..., None] / areas)), axis=-1)
        return jax.nn.one_hot(nearest, len(areas)) * batch["generated"][..., None]

    def _areas(self) -> dict[int, float]:
        """Tokens of an image of each resolution."""
        down = self._config.model.tokenizer.downsampling
        return {side: (side / down) ** 2 for side in sorted(self._config.data.resolutions)}
