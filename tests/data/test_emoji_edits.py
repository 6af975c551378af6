"""Pairs that are made from captions: what differs in them, and which are held out."""

from collections import Counter

import pytest

from bitdance_jax.data.emoji import CaptionedEmojiSource
from bitdance_jax.data.emoji_edits import Look, difference, emoji_edits, instructions, looks, rest


@pytest.fixture(scope="module")
def source():
    return emoji_edits()


@pytest.fixture(scope="module")
def parsed():
    return looks(CaptionedEmojiSource().captions)


def test_looks():
    captions = [
        "astronaut, dark skin tone",
        "man astronaut",
        "woman, medium-light skin tone, beard",
        "old man",
        "mermaid, light skin tone",
        "kiss, woman, man, dark skin tone",
        "woman and man holding hands",
        "snowman",
    ]
    assert looks(captions) == [
        Look("{} astronaut", "person", "dark"),
        Look("{} astronaut", "man"),
        Look("{}", "woman", "medium-light", "beard"),
        Look("older {}", "man"),
        Look("mer{}", "woman", "light"),
        Look("kiss, woman, man", None, "dark"),
        Look("woman and man holding hands"),
        Look("snowman"),
    ]


def test_pairs_differ_in_one_attribute_which_the_instruction_names(source, parsed):
    counts = Counter()
    for pair in source.pairs:
        one, other = parsed[pair.source], parsed[pair.target]
        attribute = difference(one, other)
        counts[attribute] += 1
        assert rest(one, attribute) == rest(other, attribute) and one != other
        value = getattr(other, attribute)
        assert pair.instructions == instructions(attribute, value)
        assert value is None or all(value.split()[0] in text for text in pair.instructions)
    assert counts == {"tone": 8_625, "person": 2_628, "hair": 720}
    training = {(pair.source, pair.target) for pair in source.split()[0].pairs}
    assert {(target, one) for one, target in training} == training


def test_no_held_out_image_is_seen(source):
    """Neither as the first image of a pair to train on nor as its second one."""
    held_out_images = {
        number for number, is_held_out in enumerate(source.images.held_out) if is_held_out
    }
    train, held_out = source.split()
    assert (len(train), len(held_out)) == (11_296, 677)
    seen = {number for pair in train.pairs for number in (pair.source, pair.target)}
    assert not seen & held_out_images
    assert {pair.target for pair in held_out.pairs} == held_out_images
    assert {pair.source for pair in held_out.pairs} <= seen
