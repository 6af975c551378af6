"""When the tokens in a run's folder are made again."""

import numpy as np
import pytest
import tiny_models

from bitdance_jax.data import token_writer
from bitdance_jax.data.sources import ArraySource
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.train.latents import cached_latents


SIZE = 8


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (20, SIZE, SIZE, 3), np.uint8),
        "label": np.arange(20, dtype=np.int32) % 3,
    }
    return ArraySource(arrays, ("a", "b", "c"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tiny_models.TOKENIZER, tiny_models.tokenizer_params())


@pytest.fixture
def encoded(monkeypatch):
    """How many images each shard written held."""
    counts = []
    write = token_writer.write_shard
    monkeypatch.setattr(
        token_writer, "write_shard", lambda shard: counts.append(len(shard.records)) or write(shard)
    )
    return counts


def test_tokens_are_made_once(tmp_path, source, tokenizer, encoded):
    folder = tmp_path / "run" / "tokens"
    cached = cached_latents(folder, source, tokenizer, image_size=SIZE, flips=True)
    assert encoded == [20] and len(cached) == 20 and cached.class_names == source.class_names
    originals = source.arrays["image"]
    for name, images in (("codes", originals), ("codes_flipped", originals[:, :, ::-1])):
        np.testing.assert_array_equal(
            [record[name] for record in map(cached.__getitem__, range(20))],
            np.packbits(tokenizer.encode(images) > 0, -1),
        )
    assert [cached[i]["label"] for i in range(20)] == source.arrays["label"].tolist()
    again = cached_latents(folder, source, tokenizer, image_size=SIZE, flips=True)
    assert encoded == [20] and again[7].keys() == {"codes", "codes_flipped", "label"}


def test_another_tokenizer_source_size_or_choice_makes_them_again(
    tmp_path, source, tokenizer, encoded
):
    def params(part):
        changed = tiny_models.tokenizer_params()
        changed[part]["conv_out"]["bias"] = changed[part]["conv_out"]["bias"] + 1
        return changed

    cached_latents(tmp_path, source, tokenizer, image_size=SIZE, flips=True)
    other_decoder = Tokenizer(tiny_models.TOKENIZER, params("decoder"))
    cached_latents(tmp_path, source, other_decoder, image_size=SIZE, flips=True)
    assert encoded == [20]

    other_encoder = Tokenizer(tiny_models.TOKENIZER, params("encoder"))
    reversed_source = ArraySource(
        source.arrays | {"image": source.arrays["image"][::-1]}, source.class_names
    )
    renamed = ArraySource(source.arrays, ("a", "b", "d"))
    for images, encoder, size, flips in (
        (source, other_encoder, SIZE, True),
        (source, tokenizer, SIZE, False),
        (reversed_source, tokenizer, SIZE, False),
        (renamed, tokenizer, SIZE, False),
        (renamed, tokenizer, 4, False),
    ):
        encoded.clear()
        cached = cached_latents(tmp_path, images, encoder, image_size=size, flips=flips)
        assert encoded == [20]
        assert (
            cached[0]["codes"].shape == (size // 2, size // 2, 1)
            and ("codes_flipped" in cached[0]) == flips
        )


@pytest.mark.parametrize("damaged", ["manifest.json", "tokens-00000-of-00001.array_record"])
def test_damaged_files_are_made_again(tmp_path, source, tokenizer, encoded, damaged):
    cached_latents(tmp_path, source, tokenizer, image_size=SIZE, flips=False)
    complete = (tmp_path / damaged).read_bytes()
    for damage in (b"", complete[: len(complete) // 2]):
        encoded.clear()
        (tmp_path / damaged).write_bytes(damage)
        cached_latents(tmp_path, source, tokenizer, image_size=SIZE, flips=False)
        assert encoded == [20] and (tmp_path / damaged).read_bytes() == complete
