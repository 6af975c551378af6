import json

import numpy as np
import pytest
from PIL import Image

from bitdance_jax.data.conversations import ConversationMixture, ConversationSource, Turn
from bitdance_jax.errors import FileError


def turns(*texts):
    names = ["human", "gpt"] * len(texts)
    return [{"from": name, "value": text} for name, text in zip(names, texts, strict=False)]


RECORDS = [
    {"image": "a.png", "conversations": turns("<image>\nWhat is it?", " A cat. ", "Sure?", "Yes.")},
    {"image": ["a.png", "b.png"], "conversations": turns("<image> <image> Same?", "No.")},
    {"image": "b.png", "conversations": turns("What is it?", "A dog.")},
    {"conversations": [{"from": "system", "value": "Be short."}, *turns("Hi", "Hello")]},
    {"image": "gone.png", "conversations": turns("<image>", "Lost.")},
    {"image": "a.png", "conversations": turns("<image> and <image>", "Two?")},
    {"image": "a.png", "conversations": turns("<image>", " ")},
    {"image": "a.png", "conversations": turns("<image>")},
    {"image": "a.png", "conversations": "text"},
    {"image": 3, "conversations": turns("<image>", "A")},
    {"image": "a.png", "conversations": [{"from": "system", "value": "<image>"}, *turns("Q", "A")]},
    {"conversations": [{"from": ["human"], "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"id": 1},
]


@pytest.fixture
def file(tmp_path):
    for name, colour, width in (("a.png", 1, 40), ("b.png", 2, 120)):
        Image.fromarray(np.full((40, width, 3), colour, np.uint8)).save(tmp_path / name)
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def test_conversations(file):
    source = ConversationSource(file)
    assert len(source) == 5
    assert source[0].turns == (
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", "A cat."),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes."),
    )
    assert [int(image[0, 0, 0]) for image in source[1].images] == [1, 2]
    assert source[2].turns[0].text == "<image>\nWhat is it?"
    assert source[3].images == ()
    assert source[3].turns[0] == Turn("system", "Be short.")
    assert source.skipped.counts == {
        "conversations with more or fewer images than <image>": 1,
        "conversations with an empty turn": 1,
        "conversations of another form": 6,
    }


def test_drawn_conversations(file):
    def mixture():
        return ConversationMixture(
            [ConversationSource(file)], seed=1, resolution=32, size_multiple=16
        )

    samples = [mixture().draw(n) for n in range(5)]
    assert [len(sample.skipped) for sample in samples].count(1) == 1
    again = mixture()
    assert [again.draw(n).record.turns for n in range(5)] == [s.record.turns for s in samples]
    sizes = {image.shape for sample in samples for image in sample.record.images}
    assert sizes == {(32, 32, 3), (16, 64, 3)}


def test_no_conversations(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps(RECORDS[5]))
    with pytest.raises(FileError, match=r"can be used: .* fewer images than <image>: 1 \(line 1\)"):
        ConversationSource(path)
    path.write_text('{"conversations"\n')
    with pytest.raises(FileError, match=r"line 1 of .*talk.jsonl cannot be read"):
        ConversationSource(path)
