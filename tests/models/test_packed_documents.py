"""The recorded training step of text to image: two documents in one row (paper 3.3)."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from flax.traverse_util import flatten_dict
from golden_models import GOLDEN, nhwc

from bitdance_jax.convert import keys
from bitdance_jax.data import packing
from bitdance_jax.data.documents import NO_LABEL, Image, captioned_image
from bitdance_jax.heads import dit
from bitdance_jax.heads.flow_matching import FlowNoise
from bitdance_jax.models.text_to_image import TextToImage
from bitdance_jax.models.text_to_image_loss import (
    Noise,
    PackedBatch,
    counts,
    token_losses,
    total_loss,
)
from bitdance_jax.nn.packed_attention import PackedMask
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer
from bitdance_jax.tokenizer import lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.transformer import order


FLIP_RATE = 0.3
"""As in all recorded training steps, so that every patch reads some flipped bits."""

RENAMED = {
    "embed_vision_mlp.": "projector.",
    "llm_model.": "",
    "vision_diffusion_head.": "vision_head.",
}


class Losses(NamedTuple):
    """Cross-entropy [T], the velocity's error [N, P], and 0.01 mean(text) + mean(vision)."""

    text: Any
    vision: Any
    total: Any


class Case(NamedTuple):
    """What was recorded, ours in float32 and in float64, and RUNS others; gradients by path."""

    recorded: tuple[Losses, dict]
    ours: tuple[Losses, dict]
    exact: tuple[Losses, dict]
    others: list[tuple[Losses, dict]]


def layout() -> dict[str, Any]:
    return json.loads((GOLDEN / "t2i_4x" / "train_layout.json").read_text())


def packed_step(recorded: dict[str, np.ndarray]) -> Callable[[Any], tuple[Losses, Any]]:
    """Losses and gradients of the recorded documents, as training computes them."""
    config, _, _ = golden_models.text_to_image("t2i_4x")
    row = recorded_row(recorded)
    batch = to_batch([row])
    noise = recorded_noise(recorded)
    labelled = np.flatnonzero(row["labels"] != NO_LABEL)

    def losses(params: Any) -> tuple[jax.Array, Losses]:
        tokens = token_losses(TextToImage(config), params, batch, noise, flip_rate=FLIP_RATE)
        total, _ = total_loss(tokens, *counts(batch))
        return total, Losses(tokens.text[0, labelled], tokens.vision[0], total)

    def step(params: Any) -> tuple[Losses, Any]:
        (_, parts), gradient = jax.value_and_grad(losses, has_aux=True)(params)
        return parts, gradient

    return step


def recorded_row(recorded: dict[str, np.ndarray]) -> packing.Row:
    config, _, _ = golden_models.text_to_image("t2i_4x")
    block = config.tokens_per_step
    tokenizer = PromptTokenizer(GOLDEN / "t2i_4x" / "model", block)
    documents = [
        captioned_image(
            config, tokenizer, caption, Image(packed_bits(recorded[f"image{i}"]), tuple(size))
        )
        for i, (caption, size) in enumerate(layout()["docs"])
    ]
    patches = len(recorded["t_normal"])
    return packing.pack(documents, len(recorded["mask"]), patches=patches, block=block, num_bytes=1)


def packed_bits(image: np.ndarray) -> np.ndarray:
    """Packed bits in sequence order of an image in NCHW."""
    tokenizer = golden_models.tokenizer("tokenizer")
    z = jax.jit(Autoencoder(tokenizer.config).apply, static_argnames="method")(
        {"params": tokenizer.params}, nhwc(image), method="encode"
    )
    sequence = order.grid_to_sequence(lfq.quantize(z), 2, "patch")[0]
    return np.packbits(np.asarray(sequence) > 0, axis=-1)


def to_batch(rows: list[packing.Row]) -> PackedBatch:
    bits = golden_models.tokenizer("tokenizer").config.bits
    arrays = packing.stack(rows)
    arrays["bits"] = 2.0 * np.unpackbits(arrays["bits"], axis=-1, count=bits) - 1
    return PackedBatch(**{name: jnp.asarray(array) for name, array in arrays.items()})


def recorded_noise(recorded: dict[str, np.ndarray]) -> Noise:
    block, bits = recorded["noise"].shape[1:]
    shape = (1, len(recorded["t_normal"]), block, bits)
    return Noise(
        jnp.reshape(jnp.asarray(recorded["flip_u1"]), shape),
        jnp.reshape(jnp.asarray(recorded["flip_u2"]), shape),
        FlowNoise(
            jnp.reshape(jnp.asarray(recorded["t_normal"]), (1, 1, -1)),
            jnp.reshape(jnp.asarray(recorded["noise"]), (1, *shape)),
        ),
    )


@pytest.fixture(scope="module")
def case() -> Case:
    config, params, _ = golden_models.text_to_image("t2i_4x")
    recorded = golden_models.read("t2i_4x/train")
    gradients = {
        key.removeprefix("grad."): value
        for key, value in recorded.items()
        if key.startswith("grad.")
    }
    for theirs, ours in RENAMED.items():
        gradients = {
            key.replace(theirs, ours, 1) if key.startswith(theirs) else key: value
            for key, value in gradients.items()
        }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dit, "timestep_features", rounding.recorded_time_features)
        step = packed_step(recorded)
        results = [
            jax.device_get(jax.jit(step)(params)),
            rounding.in_float64(step)(params),
            *rounding.other_runs(step, params),
        ]
    ours, exact, *others = ((losses, flatten_dict(gradient)) for losses, gradient in results)
    expected = Losses(recorded["text_loss"], recorded["vision_loss"], recorded["loss"].reshape(()))
    return Case(
        (expected, flatten_dict(keys.convert(gradients, keys.text_to_image(config)))),
        ours,
        exact,
        others,
    )


@pytest.mark.parametrize("part", Losses._fields)
def test_losses(case, part):
    exact = getattr(case.exact[0], part)
    others = [getattr(losses, part) for losses, _ in case.others]
    assert rounding.bound(exact, others) < 1e-3
    for losses, _ in (case.ours, case.recorded):
        rounding.assert_rounded(getattr(losses, part), exact, others)


def test_gradients(case):
    assert len(case.recorded[1]) == 5
    for path, recorded in case.recorded[1].items():
        exact = case.exact[1][path]
        others = [gradient[path] for _, gradient in case.others]
        assert rounding.bound(exact, others) < 1, path
        for gradient in (case.ours[1][path], recorded):
            rounding.assert_rounded(gradient, exact, others, "/".join(path))


def test_documents_are_the_recorded_ones():
    recorded = golden_models.read("t2i_4x/train")
    row = recorded_row(recorded)
    np.testing.assert_array_equal(row["positions"], recorded["position_ids"])
    np.testing.assert_array_equal(row["tokens"][recorded["text_indexes"]], recorded["text_ids"])
    np.testing.assert_array_equal(row["visual"].ravel(), recorded["vision_indexes"])
    np.testing.assert_array_equal(row["conditions"].ravel(), recorded["vision_loss_indexes"])
    labelled = np.flatnonzero(row["labels"] != NO_LABEL)
    np.testing.assert_array_equal(labelled, recorded["text_loss_indexes"])
    np.testing.assert_array_equal(row["labels"][labelled], recorded["text_labels"])
    mask = PackedMask(row["documents"][None], row["limits"][None]).array()[0]
    np.testing.assert_array_equal(mask, recorded["mask"])


def test_mask_and_positions():
    """A token sees what is not later in its document, and all of its own block of an image."""
    recorded = golden_models.read("t2i_4x/train")
    packed = layout()
    document = np.repeat(np.arange(2), packed["document_lens"])
    segment = np.repeat(np.arange(6), packed["split_lens"])
    inside = np.concatenate([np.arange(n) for n in packed["split_lens"]])
    parallel = np.array(packed["attn_modes"])[segment] == "parallel"
    block = np.where(parallel & (inside >= 2), (inside - 2) // packed["parallel_num"], -1)
    seen = np.zeros_like(recorded["mask"])
    for query in range(len(seen)):
        for key in range(len(seen)):
            together = segment[query] == segment[key] and block[query] == block[key] >= 0
            seen[query, key] = document[query] == document[key] and (key <= query or together)
    np.testing.assert_array_equal(recorded["mask"], seen)
    np.testing.assert_array_equal(
        recorded["position_ids"], np.concatenate([np.arange(n) for n in packed["document_lens"]])
    )
