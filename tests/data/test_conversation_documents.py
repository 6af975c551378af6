"""Conversations as documents."""

import numpy as np
import pytest
import tiny_models

from bitdance_jax.data.conversation_config import ConversationDataConfig
from bitdance_jax.data.conversation_documents import conversation_document, edit_document
from bitdance_jax.data.conversations import Turn
from bitdance_jax.data.documents import NO_LABEL, Image
from bitdance_jax.data.interleaved import Interleaved
from bitdance_jax.errors import ConfigError
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.text.prompt_tokenizer import LongPrompt, PromptTokenizer


CONFIG = tiny_models.TEXT_TO_IMAGE


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = toy_text_to_image.tokenizer_json(CONFIG.tokens_per_step)
    (folder / "tokenizer.json").write_text(text)
    return PromptTokenizer(folder)


def image(size=(4, 4)) -> Image:
    return Image(None, size, pixels=np.zeros((*size, 3), np.uint8))


def test_two_turns(tokenizer):
    """Question and answer, then an instruction and an image."""
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", "A cat."),
        Turn("user", "Make it night."),
        Turn("assistant", "So: <image>"),
    ]
    document = conversation_document(
        CONFIG, tokenizer, turns, [image(), image((4, 8))], max_tokens=100
    )
    vision_end, end = tokenizer.end_of_image()
    ids = CONFIG.image_tokens
    question = tokenizer.encode("Be brief.\nWhat is it?", 100)
    instruction = tokenizer.encode("Make it night.", 100)
    answer = tokenizer.encode_answer("A cat.", 100)
    second = tokenizer.encode_answer("So:", 100)
    first = [ids.vision_start, ids.first_resolution + 1, ids.first_resolution + 1]
    generated = [ids.vision_start, ids.first_resolution + 1, ids.first_resolution + 3]
    queries = [ids.first_query + i for i in range(3)]
    expected = [
        *first,
        *[0] * 4,
        vision_end,
        *question,
        *answer,
        end,
        *tokenizer.between_turns(),
        *instruction,
        *second,
        *generated,
        *queries,
        *[0] * 8,
        vision_end,
        end,
    ]
    assert document.tokens.tolist() == expected
    assert document.generated.tolist() == [False, True, True]
    # Only what the assistant says is predicted.
    predicted = document.labels[document.labels != NO_LABEL].tolist()
    assert predicted == [*answer, end, *second, end]
    # The first label is at the end of the question's template.
    assert document.labels[8 + len(question) - 1] == answer[0]


def test_a_long_turn(tokenizer):
    turns = [Turn("user", "What?"), Turn("assistant", "a" * 200)]
    with pytest.raises(LongPrompt):
        conversation_document(CONFIG, tokenizer, turns, [], max_tokens=100)


class Numbers:
    def __init__(self, name):
        self.name = name

    def draw(self, n):
        return self.name, n


def test_shares_are_exact(as_users_call):
    both = Interleaved([Numbers("a"), Numbers("b")], [0.7, 0.3], seed=5)
    drawn = [both.draw(n) for n in range(100)]
    for name, count in (("a", 70), ("b", 30)):
        assert [number for kind, number in drawn if kind == name] != []
        assert sorted(number for kind, number in drawn if kind == name) == list(range(count))
    assert both.draw(57) == drawn[57]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_bad_share(share):
    with pytest.raises(ConfigError, match="share must be in"):
        ConversationDataConfig(share=share)


def test_an_edit_is_a_conversation_of_one_turn(tokenizer):
    """Without its instruction it is what guidance sees: the image and the unconditional prompt."""
    source, target = image((4, 8)), image((4, 8))
    turns = [Turn("user", "<image>\nmake it night"), Turn("assistant", "<image>")]
    talk = conversation_document(CONFIG, tokenizer, turns, [source, target], max_tokens=100)
    documents = [
        edit_document(CONFIG, tokenizer, text, source, target, max_tokens=100)
        for text in ("make it night", None)
    ]
    for name in ("tokens", "labels", "limits", "generated", "conditions"):
        np.testing.assert_array_equal(getattr(documents[0], name), getattr(talk, name))
    prompt, unconditional = tokenizer.encode("make it night", 100), tokenizer.unconditional()
    before = 3 + 8 + 1
    tokens = documents[0].tokens.tolist()
    rest = tokens[before + len(prompt) :]
    assert documents[1].tokens.tolist() == [*tokens[:before], *unconditional, *rest]
    assert (documents[1].labels == NO_LABEL).all()
    assert documents[1].generated.tolist() == [False, False, True, True]
