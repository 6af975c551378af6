"""The recorded training step of text to image: two documents in one row (paper 3.3), through our language model and head."""

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
from bitdance_jax.heads import binary_diffusion as head
from bitdance_jax.heads import flow_matching as objective
from bitdance_jax.models.text_to_image import TextToImage, sinusoidal_2d, token_positions
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
    """Cross-entropy [tokens], the velocity's error [patches, P], the mean over bits, and 0.01 mean(text) + mean(vision)."""

    text: Any
    vision: Any
    total: Any


class Case(NamedTuple):
    """What was recorded, computed in float32, exact, and in float32 RUNS times; gradients flat, by path."""

    recorded: tuple[Losses, dict]
    ours: tuple[Losses, dict]
    exact: tuple[Losses, dict]
    others: list[tuple[Losses, dict]]


def layout() -> dict[str, Any]:
    return json.loads((GOLDEN / "t2i_4x" / "train_layout.json").read_text())


def codes_of(image: np.ndarray) -> jax.Array:
    """Bits in sequence order [T, K]."""
    tokenizer = golden_models.tokenizer("tokenizer")
    z = jax.jit(Autoencoder(tokenizer.config).apply, static_argnames="method")(
        {"params": tokenizer.params}, nhwc(image), method="encode"
    )
    return order.grid_to_sequence(lfq.quantize(z), 2, "patch")[0]


def packed_step(recorded: dict[str, np.ndarray]) -> Callable[[Any], tuple[Losses, Any]]:
    config, _, _ = golden_models.text_to_image("t2i_4x")
    at, block = (
        {name: jnp.asarray(array) for name, array in recorded.items()},
        config.tokens_per_step,
    )
    xy = jnp.concatenate(
        [jnp.asarray(token_positions(config, *size)) for _, size in layout()["docs"]]
    )
    bits = jnp.concatenate([codes_of(recorded[f"image{i}"]) for i in range(2)])
    flipped = jnp.where(at["flip_u1"] < FLIP_RATE * at["flip_u2"], -bits, bits)
    clean = bits.reshape(-1, block, bits.shape[-1])
    t = objective.training_times(at["t_normal"], config.head)
    x_t = objective.interpolate(clean, at["noise"], t)

    def losses(params: Any) -> tuple[jax.Array, Losses]:
        bound = TextToImage(config).bind({"params": params})
        x = jnp.zeros((1, len(at["mask"]), config.text.dim))
        x = x.at[:, at["text_indexes"]].set(bound.embed_prefix(at["text_ids"][None]))
        x = x.at[:, at["vision_indexes"]].set(bound.embed_bits(flipped[None], xy))
        hidden, _ = bound.read(x, at["position_ids"][None], at["mask"][None])
        condition = hidden[0, at["vision_loss_indexes"]] + sinusoidal_2d(xy, config.text.dim)
        predicted = bound.head(x_t, t, condition.reshape(-1, block, config.text.dim))
        vision = jnp.mean(objective.velocity_loss(predicted, clean, t), axis=-1)
        logits = jax.nn.log_softmax(bound.text.logits(hidden[:, at["text_loss_indexes"]])[0])
        text = -jnp.take_along_axis(logits, at["text_labels"][:, None], axis=-1)[:, 0]
        total = 0.01 * jnp.mean(text) + jnp.mean(vision)
        return total, Losses(text, vision, total)

    def step(params: Any) -> tuple[Losses, Any]:
        (_, parts), gradient = jax.value_and_grad(losses, has_aux=True)(params)
        return parts, gradient

    return step


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
        patch.setattr(head, "timestep_features", rounding.recorded_time_features)
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
    exact, others = (
        getattr(case.exact[0], part),
        [getattr(losses, part) for losses, _ in case.others],
    )
    assert rounding.bound(exact, others) < 1e-3
    for losses, _ in (case.ours, case.recorded):
        rounding.assert_rounded(getattr(losses, part), exact, others)


def test_gradients(case):
    assert len(case.recorded[1]) == 5
    for path, recorded in case.recorded[1].items():
        exact, others = case.exact[1][path], [gradient[path] for _, gradient in case.others]
        assert rounding.bound(exact, others) < 1, path
        for gradient in (case.ours[1][path], recorded):
            rounding.assert_rounded(gradient, exact, others, "/".join(path))


def test_mask_and_positions():
    """Of its own document a token sees what is not later; past the two tokens that open an image also all of its own block of P."""
    recorded, packed = golden_models.read("t2i_4x/train"), layout()
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
