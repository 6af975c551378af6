"""Images in prompts: editing and describing with a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
import tiny_models

from bitdance_jax.config import SamplerConfig, TextSamplerConfig
from bitdance_jax.data import packing
from bitdance_jax.data.conversation_documents import conversation_document, edit_document
from bitdance_jax.data.conversations import Turn
from bitdance_jax.data.documents import Image
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.models.text_to_image import TextToImage as TextToImageModule
from bitdance_jax.models.text_to_image import init_params
from bitdance_jax.models.text_to_image_loss import PackedBatch, sample_noise, token_losses
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.pipelines.image_prompts import ImagePrompt
from bitdance_jax.pipelines.text_to_image import TextToImage


SAMPLER = SamplerConfig(head_steps=2, guidance_scale=2.0, guidance_schedule="constant")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TextToImage:
    folder = tmp_path_factory.mktemp("models") / "toy"
    toy_text_to_image.save(folder, tiny_models.TEXT_TO_IMAGE)
    model = TextToImage.load(folder)
    model.default_size = (8, 8)
    return model


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (30, 62, 3), np.uint8)


def test_an_edit_sees_the_image(model, image, tmp_path):
    """It has the size of the fitted image, and another image gives another one."""
    options = {"sampler": SAMPLER, "progress": False, "batch_size": 1}
    edited = model.edit(image, "make it night", 3, **options)
    fitted = model.fit(image)
    assert edited.shape == (1, *fitted.shape) == (1, 4, 16, 3)
    file = tmp_path / "image.png"
    PIL.Image.fromarray(image).save(file)
    np.testing.assert_array_equal(model.edit(file, "make it night", 3, **options), edited)
    assert (model.edit(255 - image, "make it night", 3, **options) != edited).any()
    shown = ImagePrompt("make it night", [model.show(image)])
    once = model.sample(shown, 3, size=fitted.shape[:2], **options)
    np.testing.assert_array_equal(once, edited)
    # With and without images in one batch; texts of images are those of the prompts.
    prompts = [ImagePrompt("make it night", [image]), "a cat"]
    options = options | {"size": fitted.shape[:2], "batch_size": 2}
    both = model.sample(prompts, 3, **options)
    assert np.abs(both[0].astype(int) - edited[0]).mean() < 1  # up to rounding
    assert [text["prompt"] for text in model.metadata(prompts)] == ["make it night", "a cat"]


def test_an_answer_depends_on_seed_and_image(model, image):
    sampler = TextSamplerConfig(max_tokens=8)
    answer = model.describe(image, "What is it?", seed=1, sampler=sampler)
    assert answer == model.describe(PIL.Image.fromarray(image), "What is it?", 1, sampler=sampler)
    others = [
        model.describe(image, "What is it?", seed=2, sampler=sampler),
        model.describe(255 - image, "What is it?", seed=1, sampler=sampler),
        model.describe(image, "Where is it?", seed=1, sampler=sampler),
    ]
    # Random weights: 8 random tokens.
    assert answer not in others


def test_bad_input(model, tmp_path, as_users_call):
    with pytest.raises(ConfigError, match=r"image must be .* got float64 \[8, 8, 3\]"):
        model.describe(np.zeros((8, 8, 3)))
    with pytest.raises(UserError, match=r"missing\.png"):
        model.edit(tmp_path / "missing.png", "make it night")
    with pytest.raises(ConfigError, match="empty"):
        model.describe(np.zeros((8, 8, 3), np.uint8), " ")


def trained(model, documents, steps, **weights):
    """The model after some steps on documents in one row, and the losses."""
    config = model.config
    length = sum(map(len, documents))
    patches = sum(len(document.visual) for document in documents)
    block = config.tokens_per_step
    row = packing.pack(documents, length, patches=patches, block=block, num_bytes=1)
    batch = PackedBatch(**{name: jnp.asarray(array)[None] for name, array in row.items()})
    bits = np.unpackbits(row["bits"], axis=-1, count=config.tokenizer.bits)
    batch = batch._replace(bits=2 * jnp.float32(bits)[None] - 1)
    module = TextToImageModule(config, scan=True)
    optimizer = optax.adam(3e-3)
    params = init_params(module, jax.random.key(0))

    def loss(params, key):
        noise = sample_noise(key[None], config, patches=patches, repeats=4)
        losses = token_losses(module, params, batch, noise)
        return weights["text"] * jnp.sum(losses.text) + weights["vision"] * jnp.mean(losses.vision)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)

    (params, _), losses = train(params)
    result = TextToImage(config, params, model.tokenizer, model.prompts, dtype=jnp.float32)
    return result, losses


def encoded(model, count: int, side: int) -> tuple[np.ndarray, list[Image]]:
    """Random images, as pixels and as they stand in documents."""
    images = np.random.default_rng(1).integers(0, 256, (count, side, side, 3), np.uint8)
    codes = np.packbits(model.tokenizer.encode(images) > 0, axis=-1)
    blank = Image(None, (side, side), pixels=images[0])
    return images, [blank.encoded(bits, model.config.patch_side) for bits in codes]


@pytest.mark.slow
def test_it_learns_to_name_what_it_sees(model):
    """Trained on four images and their names, as documents of conversations."""
    names = ["cat", "dog", "sun", "car"]
    images, shown = encoded(model, 4, 8)
    documents = []
    for name, image in zip(names, shown, strict=True):
        turns = [Turn("user", "<image>\nWhat is it?"), Turn("assistant", name)]
        documents.append(
            conversation_document(model.config, model.prompts, turns, [image], max_tokens=100)
        )
    result, losses = trained(model, documents, 60, text=1, vision=0)
    result.default_size = (8, 8)
    assert losses[-1] < 0.1 * losses[0]
    greedy = TextSamplerConfig(max_tokens=8, temperature=0.0)
    answers = [result.describe(image, "What is it?", sampler=greedy) for image in images]
    assert answers == names
    assert result.describe(images[2], "What is it?", sampler=TextSamplerConfig(top_p=0.5)) == "sun"


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")  # computing takes longer than compiling
def test_it_learns_to_edit(model):
    """To the same image, or to the first one: by the image and by the instruction."""
    images, shown = encoded(model, 2, 4)
    asked = {"keep": [0, 1], "first": [0, 0]}
    documents = [
        edit_document(model.config, model.prompts, text, shown[i], shown[target], max_tokens=100)
        for text, targets in asked.items()
        for i, target in enumerate(targets)
    ]
    result, _ = trained(model, documents, 600, text=0, vision=1)
    result.default_size = (4, 4)
    decoded = model.tokenizer.decode(model.tokenizer.encode(images)).astype(int)
    for text, targets in asked.items():
        edited = result.sample(
            [ImagePrompt(text, [image]) for image in images],
            size=(4, 4),
            sampler=SAMPLER,
            progress=False,
        )
        distances = np.abs(edited[:, None] - decoded).mean(axis=(2, 3, 4))
        assert distances.argmin(axis=1).tolist() == targets
