"""Pairs of a file, and the samples that are drawn from them."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from bitdance_jax.data.captioned_encoding import EncodedImages
from bitdance_jax.data.edit_config import EditDataConfig
from bitdance_jax.data.edits import EditMixture, read_edits
from bitdance_jax.errors import ConfigError, FileError


LINES = [
    {"source": "a.png", "target": "b.png", "instruction": "make it night", "split": "train"},
    {"source": "b.png", "target": "a.png", "instruction": ["make it day", " by  day "]},
    {"source": "a.png", "target": "gone.png", "instruction": "make it vanish"},
    {"source": "a.png", "target": "c.png", "instruction": "mirror it", "split": "test"},
    {"source": "a.png", "instruction": "make it night"},
    {"source": "a.png", "target": ["b.png"], "instruction": "make it night"},
    {"source": "a.png", "target": "b.png", "instruction": " "},
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for number, name in enumerate("abc"):
        pixels = np.full((20, 40, 3), 80 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


def make_mixture(sources, **options):
    return EditMixture(sources, seed=1, resolution=16, size_multiple=8, **options)


def test_pairs(file):
    source = read_edits(file)
    assert len(source) == 4 and len(source.images) == 4
    assert source[1].instructions == ("make it day", "by day")
    assert source[1].source.image[0, 0, 0] == 80 and source[1].target.image[0, 0, 0] == 0
    assert source.skipped.counts == {"pairs of another form": 2, "pairs without an instruction": 1}
    train, held_out = source.split()
    assert len(train) == 4 and held_out is None
    config = EditDataConfig(paths=(str(file),))
    (train,), (held_out,) = config.open_splits("split")
    assert [len(train), len(held_out)] == [3, 1]
    assert held_out[0].instructions == ("mirror it",)


def test_drawn_pairs(file, capsys):
    """Number n does not depend on what was drawn before; damaged images are replaced; each
    instruction is drawn, and some are dropped."""
    source = read_edits(file)
    mixture = make_mixture([source], text_drop=0.25)
    samples = [mixture.draw(n) for n in range(200)]
    again = pickle.loads(pickle.dumps(mixture)).draw(123)
    assert again.instruction == samples[123].instruction
    np.testing.assert_array_equal(again.record.target.image, samples[123].record.target.image)
    texts = [sample.instruction for sample in samples]
    assert set(texts) == {None, "make it night", "make it day", "by day", "mirror it"}
    assert 30 < texts.count(None) < 70
    assert {sample.record.source.size for sample in samples} == {(8, 32)}
    damaged = [sample for sample in samples if sample.skipped]
    assert len(damaged) == 50 and "gone.png" in damaged[0].skipped[0]


def test_tokens_in_memory(file, capsys):
    """Each image is encoded once; those that are damaged are replaced as before."""
    source = read_edits(file)
    encoded = []

    def encode(images):
        encoded.extend(images)
        return [image[::8, ::8, :1] // 80 for image in images]

    images = EncodedImages(source.images, [0, 1, 2, 3], encode, resolutions=[16], size_multiple=8)
    assert "gone.png" in capsys.readouterr().err
    assert len(encoded) == 3
    of_pixels, of_tokens = (make_mixture([one]) for one in (source, source.with_images(images)))
    for n in range(8):
        expected, sample = of_pixels.draw(n), of_tokens.draw(n)
        assert (sample.instruction, sample.skipped) == (expected.instruction, expected.skipped)
        for name in ("source", "target"):
            tokens = getattr(sample.record, name).tokens
            image = getattr(expected.record, name).image
            assert tokens.size == image.shape[:2]
            np.testing.assert_array_equal(tokens.bits, image[::8, ::8, :1] // 80)


def test_bad_files(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "a.png"}')
    with pytest.raises(FileError, match=r"no pairs that can be used: pairs of another form: 1"):
        read_edits(path)
    path.write_text(json.dumps(LINES[0] | {"split": "train"}))
    with pytest.raises(ConfigError, match=r"must mark some images of .*pairs\.jsonl"):
        read_edits(path, split_field="split")
    with pytest.raises(ConfigError, match="share must be in"):
        EditDataConfig(share=1.0)
