"""The embedded images, as images with labels and as captioned ones."""

import pickle

import numpy as np
import pytest

from bitdance_jax.data.captioned_config import CaptionedDataConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.emoji import (
    SIDE,
    CaptionedEmojiSource,
    EmojiArchive,
    EmojiSource,
    emoji_images,
)
from bitdance_jax.data.records import select
from bitdance_jax.data.sources import summary


TONE = " skin tone"


@pytest.fixture(scope="module")
def source():
    return EmojiSource()


@pytest.fixture(scope="module")
def captioned():
    return CaptionedEmojiSource()


def parts(caption):
    """Of "woman, dark skin tone, beard": "woman, beard" and {"dark skin tone"}."""
    words = caption.split(", ")
    tones = {word for word in words if word.endswith(TONE)}
    return ", ".join(word for word in words if word not in tones), tones


def test_splits(source):
    assert (len(source), len(source.class_names), source.held_out.sum()) == (3127, 97, 99)
    data = DataConfig()
    assert [len(split) for split in data.open_splits()] == [3028, 99]
    assert [len(data.open_split(split)) for split in ("train", "heldout", "all")] == [
        3028,
        99,
        3127,
    ]
    first = int(np.flatnonzero(source.held_out)[0])
    held_out, train = data.open_split("heldout"), data.open_split("train")
    np.testing.assert_array_equal(held_out[0]["image"], source[first]["image"])
    np.testing.assert_array_equal(train[first]["image"], source[first + 1]["image"])
    assert summary(*data.open_splits()) == "3,028 images in 97 classes to train on, 99 held out"


def test_records(source):
    assert source.class_names == tuple(sorted(source.class_names))
    labels = set()
    for index in (0, 1500, 3126):
        image, label = source[index]["image"], source[index]["label"]
        assert (
            image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8 and label.dtype == np.int32
        )
        assert (image[0, 0] > 240).all()  # on white
        labels.add(source.class_names[label])
    assert "face-smiling" in labels and len(labels) == 3
    with pytest.raises(IndexError):
        source[3127]


def test_the_captioned_images_are_the_same(source, captioned):
    assert len(captioned) == 3127
    assert captioned[0].captions == ("grinning face",)
    for index in (0, 700, 3126):
        np.testing.assert_array_equal(captioned[index].image, source[index]["image"])
    held_out = [split == "held_out" for split in captioned.splits]
    np.testing.assert_array_equal(held_out, source.held_out)
    train, evaluation = CaptionedDataConfig(paths=("emoji",)).open_splits()
    assert (len(train[0]), len(evaluation[0])) == (3028, 99)


def test_held_out_captions_are_new_combinations():
    """Of a name and a skin tone that other captions have."""
    texts: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for record in EmojiArchive().records:
        texts[record["split"]].add(record["text"])
    assert len(texts["held_out"]) == 99 and not texts["held_out"] & texts["train"]
    names, tones = zip(*map(parts, texts["train"]), strict=True)
    for text in texts["held_out"]:
        name, own_tones = parts(text)
        assert name in names and len(own_tones) == 1 and own_tones in tones, text


def test_other_processes_get_the_images(source, captioned):
    again = pickle.loads(pickle.dumps((source, captioned)))
    np.testing.assert_array_equal(again[0][9]["image"], source[9]["image"])
    assert again[1][9].captions == captioned[9].captions


def test_images_of_a_split(few_emoji):
    source = select(EmojiSource(), "heldout")
    images = emoji_images("heldout", 16)
    assert images.shape == (len(source), 16, 16, 3)
    np.testing.assert_array_equal(images[3], source[3]["image"])
