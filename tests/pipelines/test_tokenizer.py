"""Images to bits and back, in chunks, and from the folders of all kinds of models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from same_images import assert_same_images

import bitdance_jax
from bitdance_jax import UserError
from bitdance_jax.pipelines import tokenizer as tokenizer_module
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.tokenizer import lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_models.save_tokenizer(root / "tokenizer")
    tiny_models.save_tokenizer(root / "gan", tiny_models.GAN_TOKENIZER)
    tiny_models.save_model(root / "model")
    toy_text_to_image.save(root / "prompts", tiny_models.TEXT_TO_IMAGE)
    return root


@pytest.fixture(scope="module")
def tokenizer(folders):
    return bitdance_jax.Tokenizer.load(folders / "tokenizer")


@pytest.fixture(scope="module")
def gan(folders):
    return bitdance_jax.Tokenizer.load(folders / "gan")


def random_images(count, height=8, width=8):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def random_codes(count, height=4, width=4):
    return np.random.default_rng(1).choice(np.int8([-1, 1]), (count, height, width, 8))


def test_encode_and_decode(tokenizer):
    images = random_images(2)
    module = Autoencoder(tiny_models.TOKENIZER)
    variables = {"params": tiny_models.tokenizer_params()}
    codes = tokenizer.encode(images)
    assert codes.dtype == np.int8 and codes.shape == (2, 4, 4, 8)
    encode, decode = (
        jax.jit(functools.partial(module.apply, method=method)) for method in ("encode", "decode")
    )
    expected = lfq.quantize(encode(variables, jnp.float32(images / 127.5 - 1)))
    assert (codes == expected).mean() > 0.99  # Values near 0 may differ in sign.
    assert 0.1 < (codes > 0).mean() < 0.9

    decoded = tokenizer.decode(codes)
    values = np.asarray(decode(variables, jnp.float32(codes)))
    assert decoded.shape == images.shape
    assert_same_images(decoded, np.clip(127.5 * values + 128, 0, 255).astype(np.uint8))


def test_images_need_not_be_square(tokenizer):
    codes = tokenizer.encode(random_images(1, height=6, width=10))
    assert codes.shape == (1, 3, 5, 8)
    assert tokenizer.decode(codes).shape == (1, 6, 10, 3)


def test_chunks_change_nothing(tokenizer, gan, monkeypatch):
    """Five images in chunks of two, so that the last chunk is smaller."""
    images = random_images(5)
    codes = random_codes(5)
    encoded = tokenizer.encode(images)
    decoded = tokenizer.decode(codes)
    gan_decoded = gan.decode(codes, seed=2)
    monkeypatch.setattr(tokenizer_module, "CHUNK_PIXELS", 2 * 8 * 8 + 1)
    np.testing.assert_array_equal(tokenizer.encode(images), encoded)
    assert_same_images(tokenizer.decode(codes), decoded)
    assert_same_images(gan.decode(codes, seed=2), gan_decoded)


def test_an_image_larger_than_a_chunk(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "CHUNK_PIXELS", 10)
    assert tokenizer.decode(random_codes(2)).shape == (2, 8, 8, 3)


def test_no_images(tokenizer):
    assert tokenizer.encode(random_images(0)).shape == (0, 4, 4, 8)
    assert tokenizer.decode(random_codes(0)).shape == (0, 8, 8, 3)


def test_gan_noise_depends_on_seed_and_number_alone(gan):
    same = np.repeat(random_codes(1), 4, axis=0)
    images = gan.decode(same, seed=5)
    assert len(np.unique(images, axis=0)) == 4
    assert_same_images(gan.decode(same[:2], seed=5, first_index=2), images[2:])
    assert (gan.decode(same, seed=6) != images).any(axis=(1, 2, 3)).all()


def test_images_of_another_size_are_one_line(tokenizer):
    with pytest.raises(UserError, match=r"divisible by 2, got 7x8"):
        tokenizer.encode(random_images(1, height=7))


def test_seeds_of_32_bits(gan):
    codes = random_codes(1)
    assert len(np.unique([gan.decode(codes, seed) for seed in (0, 2**31, 2**32 - 1)], axis=0)) == 3
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed must be between 0 and 4294967295, got {seed}"):
            gan.decode(codes, seed)


@pytest.mark.parametrize("kind", ["model", "prompts"])
def test_the_tokenizer_of_a_full_model(folders, kind):
    """The pipeline's, and `Tokenizer.load`'s of its folder."""
    images = random_images(2, 8, 8)
    alone = bitdance_jax.Tokenizer.load(folders / kind)
    model = bitdance_jax.load(folders / kind)
    codes = alone.encode(images)
    assert codes.shape == (2, 4, 4, 8)
    np.testing.assert_array_equal(model.tokenizer.encode(images), codes)
    np.testing.assert_array_equal(model.tokenizer.decode(codes), alone.decode(codes))


def test_a_tokenizer_folder_is_no_pipeline(folders):
    with pytest.raises(UserError, match=r"Tokenizer\.load"):
        bitdance_jax.load(folders / "tokenizer")


def test_a_decoder_alone(tokenizer):
    decoder = bitdance_jax.Tokenizer(tokenizer.config, {"decoder": tokenizer.params["decoder"]})
    assert decoder.decode(random_codes(1)).shape == (1, 8, 8, 3)
    with pytest.raises(UserError, match="encoder"):
        decoder.encode(random_images(1))
