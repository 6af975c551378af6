"""What the loss of packed documents must not depend on: rows, padding, micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from tiny_models import TEXT_TO_IMAGE as CONFIG

from bitdance_jax.data import packing
from bitdance_jax.data.documents import Document, Image, Text, make_document
from bitdance_jax.heads.flow_matching import FlowNoise
from bitdance_jax.models.text_to_image import TextToImage
from bitdance_jax.models.text_to_image_loss import (
    Noise,
    PackedBatch,
    counts,
    sample_noise,
    token_losses,
    total_loss,
)


MODEL = TextToImage(CONFIG)
BITS = CONFIG.tokenizer.bits
BLOCK = CONFIG.tokens_per_step
MULTIPLE = CONFIG.size_multiple
REPEATS = 2


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, BLOCK), jnp.int32)
    xy = jnp.zeros((BLOCK, 2), jnp.int32)
    bits = jnp.zeros((1, BLOCK, BITS))
    noise = FlowNoise(jnp.zeros((1, 1, 1)), bits[:, None, None])
    return random_params(MODEL, tokens, xy, bits, noise)


def document(
    seed: int, sizes: tuple[tuple[int, int, bool], ...], predicted: bool = True
) -> Document:
    """Random text and images of so many patches by so many, generated or not."""
    rng = np.random.default_rng(seed)
    segments: list[Text | Image] = []
    for height, width, generated in sizes:
        size = (height * MULTIPLE, width * MULTIPLE)
        tokens = height * width * BLOCK
        words = rng.integers(1, 40, rng.integers(3, 8))
        segments.append(Text(words, np.full(len(words), predicted)))
        bits = rng.integers(0, 256, (tokens, -(-BITS // 8)), np.uint8)
        segments.append(Image(bits, size, generated))
    segments.append(Text(np.array([5, 6]), np.array([False, predicted])))
    return make_document(CONFIG, segments)


DOCUMENTS = (
    document(0, ((1, 2, True),)),
    document(1, ((2, 1, False), (1, 1, True))),
    document(2, ((2, 2, True),)),
)


def to_batch(rows: list[packing.Row]) -> PackedBatch:
    arrays = packing.stack(rows)
    arrays["bits"] = 2.0 * np.unpackbits(arrays["bits"], axis=-1, count=BITS) - 1
    return PackedBatch(**{name: jnp.asarray(array) for name, array in arrays.items()})


def noise_of(rows: list[list[int]], patches: int) -> Noise:
    """Every document's own random numbers in the rows that hold these documents."""
    parts = []
    for row in rows:
        own = [
            sample_noise(
                jax.random.key(number)[None],
                CONFIG,
                patches=len(DOCUMENTS[number].visual),
                repeats=REPEATS,
            )
            for number in row
        ]
        # The axis of patches is 1 for flips, 2 for times and noise.
        joined = [
            jnp.concatenate(arrays, axis=axis)
            for *arrays, axis in zip(*map(jax.tree.leaves, own), (1, 1, 2, 2), strict=True)
        ]
        parts.append(
            [
                jnp.pad(
                    array,
                    [
                        (0, patches - array.shape[axis] if i == axis else 0)
                        for i in range(array.ndim)
                    ],
                )
                for array, axis in zip(joined, (1, 1, 2, 2), strict=True)
            ]
        )
    flip_u1, flip_u2, *head = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Noise(flip_u1, flip_u2, FlowNoise(*head))


def loss_and_gradient(params, rows: list[list[int]], length: int, patches: int):
    packed = [
        packing.pack([DOCUMENTS[n] for n in row], length, patches=patches, block=BLOCK, num_bytes=1)
        for row in rows
    ]
    batch = to_batch(packed)
    noise = noise_of(rows, patches)

    return _loss_and_gradient(params, batch, noise)


@jax.jit
@jax.value_and_grad
def _loss_and_gradient(params, batch: PackedBatch, noise: Noise):
    losses = token_losses(MODEL, params, batch, noise, flip_rate=0.3)
    return total_loss(losses, *counts(batch), text_weight=0.5)[0]


@pytest.fixture(scope="module")
def apart(params):
    length = max(map(len, DOCUMENTS))
    return loss_and_gradient(params, [[0], [1], [2]], length, patches=4)


@pytest.mark.parametrize("rows", [[[0, 1, 2]], [[2, 0], [1]], [[1], [2, 0]]])
def test_packing_and_padding_do_not_matter(params, apart, rows):
    length = sum(map(len, DOCUMENTS)) + 3
    loss, gradient = loss_and_gradient(params, rows, length, patches=10)
    np.testing.assert_allclose(loss, apart[0], rtol=1e-5)
    for ours, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(apart[1]), strict=True):
        scale = float(jnp.max(jnp.abs(expected))) + 1e-6
        np.testing.assert_allclose(ours, expected, atol=1e-4 * scale)


def losses_of(params, document: Document, flip_rate: float = 0.0, seed: int = 0):
    patches = max(1, len(document.visual))
    batch = to_batch(
        [packing.pack([document], len(document), patches=patches, block=BLOCK, num_bytes=1)]
    )
    noise = sample_noise(jax.random.key(seed)[None], CONFIG, patches=patches, repeats=1)
    return batch, _losses(params, batch, noise, flip_rate)


@functools.partial(jax.jit, static_argnames="flip_rate")
def _losses(params, batch: PackedBatch, noise: Noise, flip_rate: float):
    return token_losses(MODEL, params, batch, noise, flip_rate=flip_rate)


def test_text_alone_and_images_alone_are_legal(params):
    words = make_document(CONFIG, [Text(np.arange(1, 9), np.ones(8, bool))])
    batch, losses = losses_of(params, words)
    loss, parts = total_loss(losses, *counts(batch), text_weight=0.5)
    assert counts(batch) == (0, 7)
    assert loss == 0.5 * parts["text_loss"] > 0
    assert parts["vision_loss"] == 0

    image = document(3, ((1, 1, True),), predicted=False)
    batch, losses = losses_of(params, image)
    loss, parts = total_loss(losses, *counts(batch))
    assert counts(batch) == (BLOCK, 0)
    assert loss == parts["vision_loss"] > 0
    assert parts["text_loss"] == 0


def test_images_that_are_only_read_are_not_flipped_and_have_no_loss(params):
    read_only = document(4, ((1, 2, False),))
    _, plain = losses_of(params, read_only, flip_rate=0.0)
    _, flipped = losses_of(params, read_only, flip_rate=1.0)
    np.testing.assert_array_equal(plain.text, flipped.text)
    assert not plain.vision.any()
    generated = document(4, ((1, 2, True),))
    _, plain = losses_of(params, generated, flip_rate=0.0)
    _, flipped = losses_of(params, generated, flip_rate=1.0)
    assert (plain.vision != flipped.vision).any()
