"""Prompt tokenizers that are trained on captions."""

import pytest

from bitdance_jax.config import ImageTokens
from bitdance_jax.errors import ConfigError
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer
from bitdance_jax.text.train_tokenizer import train_tokenizer


CAPTIONS = ["woman astronaut, dark skin tone", "man astronaut, light skin tone", "crème brûlée"]


def make(folder, captions=CAPTIONS, vocab_size=400):
    content = train_tokenizer(captions, vocab_size=vocab_size, num_resolutions=8, tokens_per_step=4)
    (folder / "tokenizer.json").write_text(content)
    return PromptTokenizer(folder)


def test_frequent_words_become_tokens(tmp_path):
    tokenizer = make(tmp_path)
    prompt = tokenizer.encode("man astronaut, dark skin tone", max_tokens=100)
    # "man", " astronaut", ",", " dark", " skin", " tone" at best, and single bytes at worst.
    assert len(prompt) - tokenizer.caption_start - len(tokenizer.after_caption()) <= 10
    assert len(tokenizer.unconditional()) <= 3
    assert len(tokenizer.end_of_image()) == 2
    assert tokenizer.tokens_per_step == 4
    assert tokenizer.image_tokens.num_resolutions == 8


@pytest.mark.parametrize("vocab_size", [280, 2000])
def test_its_image_tokens_follow_from_the_size(tmp_path, vocab_size):
    """Also where the captions are too few for so many tokens."""
    expected = ImageTokens.of_vocabulary(vocab_size, num_resolutions=8)
    assert make(tmp_path, vocab_size=vocab_size).image_tokens == expected


def test_every_text_can_be_encoded(tmp_path):
    tokenizer = make(tmp_path, captions=[], vocab_size=256)
    ids = tokenizer.encode("猫 😀\n", max_tokens=100)
    assert max(ids) < tokenizer.image_tokens.vision_start
    # <|im_start|>, the bytes of "user\n" and of the caption, and the template behind.
    assert len(ids) == 1 + 5 + 9 + len(tokenizer.after_caption())


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(ConfigError, match="at least 256") as error:
        make(tmp_path, vocab_size=255)
    assert error.value.field == "vocab_size"
