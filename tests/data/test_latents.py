"""Bits in files: packing, when a cached file is made again, and the same batches with and without one."""

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from bitdance_jax.config import AugmentConfig
from bitdance_jax.data import latents
from bitdance_jax.data.latents import EncodedBatches, cached_latents, pack, unpack
from bitdance_jax.data.loader import make_loader
from bitdance_jax.data.sources import ArraySource
from bitdance_jax.errors import UserError
from bitdance_jax.sampling.pipeline import Tokenizer


SIZE = 8
UNCHANGED = AugmentConfig(min_crop=1.0, flip=0.0)


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    arrays = {"image": rng.integers(0, 256, (20, SIZE, SIZE, 3), np.uint8), "label": np.arange(20, dtype=np.int32) % 3}
    return ArraySource(arrays, ("a", "b", "c"))


class CountingTokenizer(Tokenizer):
    """Notes how many pictures each call encodes."""

    def __init__(self, params):
        super().__init__(tiny_models.TOKENIZER, params)
        self.encoded = []

    def encode(self, pictures):
        self.encoded.append(len(pictures))
        return super().encode(pictures)


@pytest.fixture(scope="module")
def shared_tokenizer():
    return CountingTokenizer(tiny_models.tokenizer_params())


@pytest.fixture
def tokenizer(shared_tokenizer):
    shared_tokenizer.encoded.clear()
    return shared_tokenizer


@pytest.fixture(scope="module")
def cache_bytes(tmp_path_factory, shared_tokenizer, source):
    path = tmp_path_factory.mktemp("cache") / "latents.npz"
    cached_latents(path, source, shared_tokenizer, SIZE, flips=True)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path, cache_bytes):
    """A finished file of `source` with both versions."""
    path = tmp_path / "latents.npz"
    path.write_bytes(cache_bytes)
    return path


@pytest.mark.parametrize("bits", [8, 12, 32])
def test_packing_round_trip(bits):
    codes = np.random.default_rng(bits).choice(np.int8([-1, 1]), (2, 3, 4, bits))
    packed = pack(codes)
    assert packed.dtype == np.uint8 and packed.shape == (2, 3, 4, -(-bits // 8))
    unpacked = unpack(jnp.asarray(packed), bits)
    assert unpacked.dtype == np.float32
    np.testing.assert_array_equal(unpacked, codes)


def test_the_first_bit_is_the_highest():
    codes = np.full((1, 1, 1, 12), -1, np.int8)
    codes[..., [0, 7, 8]] = 1
    np.testing.assert_array_equal(pack(codes)[0, 0, 0], [0b10000001, 0b10000000])


def test_the_cache_holds_every_picture_in_both_versions(path, source, tokenizer):
    cached = cached_latents(path, source, tokenizer, SIZE, flips=True)
    assert tokenizer.encoded == []
    assert cached.class_names == source.class_names and len(cached) == 20
    images = source.arrays["image"]
    np.testing.assert_array_equal(cached.arrays["label"], source.arrays["label"])
    np.testing.assert_array_equal(cached.arrays["codes"], pack(tokenizer.encode(images)))
    np.testing.assert_array_equal(cached.arrays["codes_flipped"], pack(tokenizer.encode(images[:, :, ::-1])))


def test_the_file_is_read_again(tmp_path, source, tokenizer):
    path = tmp_path / "run" / "latents.npz"
    made = cached_latents(path, source, tokenizer, SIZE, flips=False)
    assert sum(tokenizer.encoded) == 20 and set(made.arrays) == {"codes", "label"}
    again = cached_latents(path, source, tokenizer, SIZE, flips=False)
    assert sum(tokenizer.encoded) == 20
    assert made.arrays.keys() == again.arrays.keys()
    for name, array in made.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    assert [file.name for file in path.parent.iterdir()] == ["latents.npz"]


def test_another_tokenizer_makes_it_again(path, source):
    params = tiny_models.tokenizer_params()
    params["encoder"]["conv_out"]["bias"] = params["encoder"]["conv_out"]["bias"] + 1
    other = CountingTokenizer(params)
    cached = cached_latents(path, source, other, SIZE, flips=True)
    assert sum(other.encoded) == 40
    np.testing.assert_array_equal(cached.arrays["codes"], pack(other.encode(source.arrays["image"])))


def test_the_decoder_does_not_count(path, source):
    params = tiny_models.tokenizer_params()
    params["decoder"]["conv_out"]["bias"] = params["decoder"]["conv_out"]["bias"] + 1
    other = CountingTokenizer(params)
    cached_latents(path, source, other, SIZE, flips=True)
    assert other.encoded == []


def test_other_pictures_sizes_or_flips_make_it_again(path, source, tokenizer):
    other = ArraySource(source.arrays | {"image": source.arrays["image"][::-1]}, source.class_names)
    renamed = ArraySource(source.arrays, ("a", "b", "d"))
    whole = path.read_bytes()
    for pictures, size, flips in ((source, SIZE, False), (other, SIZE, True), (renamed, SIZE, True), (source, 4, True)):
        tokenizer.encoded.clear()
        path.write_bytes(whole)
        cached = cached_latents(path, pictures, tokenizer, size, flips=flips)
        assert sum(tokenizer.encoded) == (40 if flips else 20)
        assert cached.arrays["codes"].shape == (20, size // 2, size // 2, 1)
        assert ("codes_flipped" in cached.arrays) == flips


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"garbage" * 100, lambda b: b[: len(b) // 2], lambda b: b[:-1]])
def test_a_damaged_file_is_made_again(path, source, tokenizer, damage):
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    cached_latents(path, source, tokenizer, SIZE, flips=True)
    assert sum(tokenizer.encoded) == 40
    assert path.read_bytes() == whole


def test_an_altered_byte_is_noticed(path, source, tokenizer):
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"codes.npy") + 200] ^= 1
    path.write_bytes(whole)
    cached_latents(path, source, tokenizer, SIZE, flips=True)
    assert sum(tokenizer.encoded) == 40


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, source, tokenizer, monkeypatch):
    def savez(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(latents.np, "savez", savez)
    path = tmp_path / "latents.npz"
    with pytest.raises(UserError) as caught:
        cached_latents(path, source, tokenizer, SIZE, flips=False)
    assert str(caught.value) == f"cannot write the latents {path}: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_an_older_file_alone(path, source, tokenizer, monkeypatch):
    def savez(file, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = path.read_bytes()
    monkeypatch.setattr(latents.np, "savez", savez)
    with pytest.raises(UserError, match="No space left on device"):
        cached_latents(path, source, tokenizer, SIZE, flips=False)
    assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]


def encoded_batches(source, tokenizer):
    return EncodedBatches(make_loader(source, batch_size=6, seed=4, image_size=SIZE, augment=UNCHANGED), tokenizer)


def assert_same_batches(actual, desired):
    assert len(actual) == len(desired)
    for a, b in zip(actual, desired, strict=True):
        assert a.keys() == b.keys() == {"codes", "label"}
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def test_encoding_on_the_fly_gives_the_cached_batches(path, source, tokenizer):
    """Over two epochs and a bit: batches run over the ends."""
    cached = make_loader(cached_latents(path, source, tokenizer, SIZE, flips=True), batch_size=6, seed=4, augment=UNCHANGED)
    fresh = encoded_batches(source, tokenizer)
    assert_same_batches([next(fresh) for _ in range(8)], [next(cached) for _ in range(8)])


def test_encoded_batches_resume(source, tokenizer):
    batches = encoded_batches(source, tokenizer)
    assert iter(batches) is batches
    for _ in range(2):
        next(batches)
    place = json.loads(json.dumps(batches.get_state()))
    rest = [next(batches) for _ in range(3)]
    batches.set_state(place)
    assert_same_batches([next(batches) for _ in range(3)], rest)
    new = encoded_batches(source, tokenizer)
    new.set_state(place)
    assert_same_batches([next(new) for _ in range(3)], rest)


def test_flips_choose_between_the_versions(path, source, tokenizer):
    cached = cached_latents(path, source, tokenizer, SIZE, flips=True)
    flip = AugmentConfig(min_crop=1.0, flip=0.5)
    batch = next(make_loader(cached, batch_size=20, seed=4, augment=flip, shuffle=False))
    flipped = [bool((codes == row["codes_flipped"]).all()) for codes, row in zip(batch["codes"], cached, strict=True)]
    plain = [bool((codes == row["codes"]).all()) for codes, row in zip(batch["codes"], cached, strict=True)]
    assert 4 < sum(flipped) < 16
    assert plain == [not choice for choice in flipped]
