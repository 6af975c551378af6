"""Captioned tokens: written, resumed, drawn again, and refused where a model cannot use them."""

import pickle

import numpy as np
import pytest
import tiny_models
from tar_files import image, samples, write_tar

from bitdance_jax.data import captioned_encoding, captioned_token_writer
from bitdance_jax.data.captioned_config import CaptionedDataConfig, open_source
from bitdance_jax.data.captioned_token_writer import describe_captioned, tokenize_captioned
from bitdance_jax.data.captioned_tokens import check_encoders
from bitdance_jax.data.token_writer import prepare
from bitdance_jax.data.tokens import Manifest
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.io.image_files import DamagedImage
from bitdance_jax.pipelines.tokenizer import Tokenizer


PARAMS = tiny_models.tokenizer_params()
MULTIPLE = 4  # The tokenizer's downsampling is 2.
CONFIG = dict(resolutions=(8, 16), text_drop=0.0)


def members():
    yield from samples(10, size=(20, 20))
    yield "bad.png", b"damaged"
    yield "bad.txt", "damaged"
    yield "bad.json", {"split": "train"}
    yield "wide.png", image(100, size=(10, 38))
    yield "wide.txt", "a wide one"
    yield "wide.json", {"split": "train"}


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.tar"
    write_tar(path, members())
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def write(folder, tar, workers=0, **changes):
    data = CaptionedDataConfig(paths=(tar,), held_out_field="split", **CONFIG)
    train, held_out = data.open_marked()
    options = dict(resolutions=data.resolutions, size_multiple=MULTIPLE, shard_size=5) | changes
    manifest = describe_captioned(train, held_out, tiny_models.TOKENIZER, PARAMS, **options)
    prepare(folder, manifest)
    return tokenize_captioned(
        train, held_out, PARAMS, folder=folder, manifest=manifest, workers=workers
    )


def quick_encoder(config, params, dtype):
    """Instead of an encoder that would be compiled: every fourth pixel of one channel."""
    return lambda images: [image[::2, ::2, :1].copy() for image in images]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(captioned_token_writer, "ImageEncoder", quick_encoder)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, tar):
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(captioned_token_writer, "ImageEncoder", quick_encoder)
        patch.setattr(captioned_encoding, "MAX_WINDOW", 4)
        assert write(folder, tar) == 12
    return folder


@pytest.mark.slow
def test_drawn_samples_are_the_tokens_of_the_drawn_images(tar, tmp_path, monkeypatch):
    """With the same order: each source is the same list of records."""
    monkeypatch.setattr(captioned_encoding, "MAX_WINDOW", 4)
    assert write(tmp_path, tar) == 12
    encode = Tokenizer(tiny_models.TOKENIZER, PARAMS).encode
    of_images = CaptionedDataConfig(paths=(tar,), held_out_field="split", **CONFIG)
    of_tokens = CaptionedDataConfig(paths=(str(tmp_path),), **CONFIG)
    splits = of_images.open_splits(), of_tokens.open_splits()
    assert [list(map(len, part)) for part in splits[0]] == [[10], [2]]
    assert [list(map(len, part)) for part in splits[1]] == [[10], [2]]
    images, codes = (
        config.samples(train, seed=0, size_multiple=MULTIPLE)
        for config, (train, _) in zip((of_images, of_tokens), splits, strict=True)
    )
    codes = pickle.loads(pickle.dumps(codes))
    sizes, skipped = set(), 0
    for n in range(10):
        image, code = images.draw(n), codes.draw(n)
        assert (image.caption, image.size, image.skipped) == (code.caption, code.size, code.skipped)
        assert code.record.image is None
        bits = np.packbits(encode(image.record.image[None])[0] > 0, axis=-1)
        np.testing.assert_array_equal(code.record.tokens.bits, bits)
        sizes.add(code.size)
        skipped += len(code.skipped)
    assert sizes == {(8, 8), (16, 16), (4, 16)} or sizes == {(8, 8), (16, 16), (8, 32)}
    assert skipped == 1


def test_records(tokens):
    source = open_source(str(tokens))
    assert source[0].captions == source.captions_of(0) == ("image 0",)
    assert {side: tokens.size for side, tokens in source[0].versions.items()} == {
        8: (8, 8),
        16: (16, 16),
    }
    assert {side: tokens.size for side, tokens in source[9].versions.items()} == {
        8: (4, 16),
        16: (8, 32),
    }
    assert source[9].versions[16].bits.shape == (4, 16, 1)
    with pytest.raises(DamagedImage, match=r"cannot read the image .*bad.png"):
        source[8]
    assert source.splits == ["train"] * 10 + ["held_out"] * 2
    assert source[10].captions == ("image 3",)


def test_resumed(quick, tar, tmp_path):
    assert write(tmp_path, tar) == 12
    names = sorted(path.name for path in tmp_path.glob("*.array_record"))
    assert len(names) == 3
    before = {name: (tmp_path / name).read_bytes() for name in names}
    (tmp_path / names[1]).unlink()
    (tmp_path / names[2]).write_bytes(before[names[2]][:100])
    with pytest.raises(UserError, match=r"is damaged|is missing"):
        open_source(str(tmp_path))
    assert write(tmp_path, tar) == 7
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    with pytest.raises(UserError, match=r"has other tokens \(size_multiple was 4, now 8\)"):
        write(tmp_path, tar, size_multiple=8)


@pytest.mark.slow
def test_worker_processes(quick, tar, tmp_path):
    folders = [tmp_path / name for name in ("threads", "processes")]
    for workers, folder in enumerate(folders):
        assert write(folder, tar, workers) == 12
    contents = [[path.read_bytes() for path in sorted(folder.glob("t*"))] for folder in folders]
    assert len(contents[0]) == 3
    assert contents[0] == contents[1]


def test_too_small_images_lack_a_version(quick, tar, tmp_path):
    write(tmp_path, tar, resolutions=(16, 32), too_small="skip", shard_size=100)
    source = open_source(str(tmp_path))
    assert source[0].versions.keys() == {16}
    data = CaptionedDataConfig(paths=(str(tmp_path),), resolutions=(32,))
    with pytest.raises(UserError, match=r"10 images in a row are too small; .* 32 pixels"):
        data.samples(data.open_splits()[0], seed=0, size_multiple=MULTIPLE).draw(0)


def test_refused(tokens, tar):
    def draw(size_multiple=MULTIPLE, **changes):
        data = CaptionedDataConfig(paths=(str(tokens),), **CONFIG | changes)
        return data.samples(data.open_splits()[0], seed=0, size_multiple=size_multiple).draw(0)

    draw(size_multiple=2)
    draw(resolutions=(8, 16, 32), resolution_weights=(1.0, 1.0, 0.0))
    with pytest.raises(ConfigError, match=r"draws 32, and the tokens in .* are of 8, 16 pixels"):
        draw(resolutions=(8, 32))
    with pytest.raises(ConfigError, match=r"needs multiples of 8 pixels; write them again"):
        draw(size_multiple=8)
    with pytest.raises(ConfigError, match=r"leave out data.captions"):
        draw(captions=("text",))
    with pytest.raises(UserError, match=r"holds captioned tokens, and not tokens of labelled"):
        Manifest.read(tokens)
    sources = CaptionedDataConfig(paths=(str(tokens),)).open_splits()[0]
    sizes = {"resolutions": (8,), "size_multiple": MULTIPLE}
    with pytest.raises(ConfigError, match="has tokens already; name the images"):
        describe_captioned(sources, [], tiny_models.TOKENIZER, PARAMS, **sizes)
    check_encoders(sources, tiny_models.TOKENIZER, PARAMS)
    other = tiny_models.tokenizer_params(tiny_models.GAN_TOKENIZER)
    with pytest.raises(UserError, match="the model's is"):
        check_encoders(sources, tiny_models.GAN_TOKENIZER, other)
