"""The added tokens of text to image, in the tokenizer files of a language model."""

import json

import golden_models
import pytest
import tokenizers

from bitdance_jax.errors import UserError
from bitdance_jax.text.image_tokens import add_image_tokens
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer, read_files


ADDED = ("<|res_", "<|query_")
FOLDER = golden_models.GOLDEN / "t2i_4x" / "model"


def without_image_tokens(files):
    """The files as before they got the tokens."""

    def kept(name):
        return not name.startswith(ADDED)

    content = {name: json.loads(data) for name, data in files.items()}
    tokenizer = content["text_tokenizer/tokenizer.json"]
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if kept(t["content"])]
    config = content["text_tokenizer/tokenizer_config.json"]
    config["added_tokens_decoder"] = {
        number: token
        for number, token in config["added_tokens_decoder"].items()
        if kept(token["content"])
    }
    special = content["text_tokenizer/special_tokens_map.json"]
    for owner in (config, special):
        owner["additional_special_tokens"] = [
            token
            for token in owner["additional_special_tokens"]
            if kept(token if isinstance(token, str) else token["content"])
        ]
    return {name: json.dumps(value).encode() for name, value in content.items()}


def opened(files, folder, tokens_per_step):
    folder.mkdir()
    for name, data in files.items():
        (folder / name.rpartition("/")[2]).write_bytes(data)
    return PromptTokenizer(folder, tokens_per_step)


def test_the_files_of_a_language_model_become_the_released_ones():
    released = read_files(FOLDER)
    bare = without_image_tokens(released)
    count = sum(b"<|res_" in token.encode() for token in _added(released))
    files = add_image_tokens(bare, 4, count)
    for name, data in released.items():
        assert json.loads(files[name]) == json.loads(data), name
    assert add_image_tokens(files, 4) == files


def _added(files):
    tokenizer = json.loads(files["text_tokenizer/tokenizer.json"])
    return [token["content"] for token in tokenizer["added_tokens"]]


def test_more_queries(tmp_path):
    """As from 16x to 64x: all ids stay, new ones follow."""
    first = opened(read_files(FOLDER), tmp_path / "4x", 4)
    files = add_image_tokens(read_files(FOLDER), 16)
    second = opened(files, tmp_path / "16x", 16)
    assert second.image_tokens == first.image_tokens
    assert second.encode("a cat", 100) == first.encode("a cat", 100)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "16x" / "tokenizer.json"))
    ids = library.encode("".join(f"<|query_{n}|>" for n in range(1, 16))).ids
    assert ids == list(range(first.image_tokens.first_query, first.image_tokens.first_query + 15))


def test_files_that_cannot_be_extended():
    files = read_files(FOLDER)
    tokenizer = json.loads(files["text_tokenizer/tokenizer.json"])
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<|other|>"})
    changed = files | {"text_tokenizer/tokenizer.json": json.dumps(tokenizer).encode()}
    with pytest.raises(UserError, match=r"after <\|query_3\|>.* <\|query_4\|> cannot follow"):
        add_image_tokens(changed, 16)
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        add_image_tokens({}, 16)
    with pytest.raises(UserError, match="vocab"):
        add_image_tokens({"text_tokenizer/tokenizer.json": b'{"model": {}}'}, 16)
