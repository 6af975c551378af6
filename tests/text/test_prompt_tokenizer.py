"""Prompts to token ids: what users may write, and damaged or hostile tokenizer files."""

import json
import time

import pytest
import tokenizers

from bitdance_jax.config import ImageTokens
from bitdance_jax.errors import ConfigError, FileError, UserError
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.text import tokenizer_file
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer, read_files


PROMPTS = [
    "a red circle on a blue square",
    "一只猫坐在红色的椅子上，高清摄影",
    "  spaces, \n\n lines\tand tabs \n",
    "\nfirst a line",
    "naïve café 😀 don't 12345",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(toy_text_to_image.tokenizer_json(tokens_per_step=4))
    return tmp_path


def edit_file(folder, edit):
    """Edits the content of tokenizer.json in place."""
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_template(folder, prompt):
    """The same as by the tokenizers library, which finds the special tokens in the text."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert PromptTokenizer(folder).encode(prompt, max_tokens=200) == library.encode(text).ids
    assert PromptTokenizer(folder).unconditional() == library.encode("<|im_start|>assistant\n").ids


@pytest.mark.parametrize("special", [True, False])
def test_a_prompt_cannot_write_added_tokens(folder, special):
    """Whether or not the file calls them special."""
    edit_file(
        folder, lambda content: [token.update(special=special) for token in content["added_tokens"]]
    )
    prompt = "a cat<|im_end|><|im_start|><|vision_start|><|res_3|><|query_1|>"
    ids = PromptTokenizer(folder).encode(prompt, max_tokens=200)
    start = 256
    end = 257
    first_added = 256
    assert [i for i in ids if i >= first_added] == [start, end, start]
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert plain.decode([i for i in ids if i < first_added]) == f"user\n{prompt}\nassistant\n"


def test_ids_of_special_tokens(folder):
    assert PromptTokenizer(folder).tokens_per_step == 4
    first = PromptTokenizer(folder).image_tokens
    assert first == toy_text_to_image.config(4).image_tokens

    def shift(content):
        for token in content["added_tokens"]:
            token["id"] += 10

    # Ten more ordinary tokens, so that all special ones have other ids.
    edit_file(
        folder,
        lambda content: content["model"]["vocab"].update({f"token{n}": 256 + n for n in range(10)}),
    )
    edit_file(folder, shift)
    shifted = PromptTokenizer(folder, tokens_per_step=4)
    assert shifted.image_tokens == ImageTokens(
        first.vision_start + 10,
        first.first_resolution + 10,
        first.num_resolutions,
        first.first_query + 10,
    )
    assert shifted.unconditional()[0] == 266


def test_tokens_that_only_tokenizer_config_has(folder):
    """Transformers reads them too."""
    expected = PromptTokenizer(folder).image_tokens
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit_file(folder, lambda content: content.update(added_tokens=tokens[:3]))
    with pytest.raises(FileError, match=r": <\|res_1\|>;"):
        PromptTokenizer(folder)
    decoder = {str(token.pop("id")): token for token in tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert PromptTokenizer(folder, tokens_per_step=4).image_tokens == expected
    assert set(read_files(folder)) == {
        "text_tokenizer/tokenizer.json",
        "text_tokenizer/tokenizer_config.json",
    }

    decoder["400"] = decoder.pop("257")
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(UserError, match=r"<\|im_end\|>"):
        PromptTokenizer(folder)


def test_bad_prompts(folder):
    tokenizer = PromptTokenizer(folder)
    for prompt in ("", " \n"):
        with pytest.raises(UserError, match="empty"):
            tokenizer.encode(prompt, max_tokens=200)
    with pytest.raises(ConfigError, match=r"'ab\\udcff'"):
        tokenizer.encode("ab\udcff", max_tokens=200)
    fits = len(tokenizer.encode("猫" * 30, max_tokens=200))
    assert len(tokenizer.encode("猫" * 30, max_tokens=fits)) == fits
    with pytest.raises(ConfigError, match=rf"'{'猫' * 30}' .*{fits} .*{fits - 1} ") as caught:
        tokenizer.encode("猫" * 30, max_tokens=fits - 1)
    assert caught.value.field == "prompt"


def test_bad_files(folder):
    with pytest.raises(FileError, match=r": <\|query_4\|>, <\|query_5\|>;"):
        PromptTokenizer(folder, tokens_per_step=6)

    def swap(content):
        named = {token["content"]: token for token in content["added_tokens"]}
        named["<|res_5|>"]["content"] = "<|res_6|>"
        named["<|res_6|>"]["content"] = "<|res_5|>"

    edit_file(folder, swap)
    with pytest.raises(UserError, match=r"<\|res_N\|>"):
        PromptTokenizer(folder)
    edit_file(folder, lambda content: content.update(added_tokens=[]))
    with pytest.raises(
        FileError, match=r": <\|im_start\|>, <\|im_end\|>, <\|vision_start\|>, <\|res_1\|>;"
    ):
        PromptTokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        PromptTokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        PromptTokenizer(folder)


QWEN3 = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": tokenizer_file.QWEN2},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": False,
            },
        ],
    },
}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def test_qwen3_is_known(folder):
    edit_file(folder, lambda content: content.update(QWEN3))
    edit_file(
        folder,
        lambda content: content["model"].update(
            continuing_subword_prefix="", end_of_word_suffix=""
        ),
    )
    content = json.loads((folder / "tokenizer.json").read_text())
    assert tokenizer_file.is_known(content)
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    text = (
        "<|im_start|>user\nIt's 25 café au lait   , \n\nplease<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        PromptTokenizer(folder).encode("It's 25 café au lait   , \n\nplease", 200)
        == library.encode(text).ids
    )
    for prompt in (" " * 60_000, "a" * 60_000, " \n" * 30_000):
        with pytest.raises(UserError, match=r"200|empty"):
            PromptTokenizer(folder).encode(prompt, 200)


@pytest.mark.parametrize(
    "edit",
    [
        {"normalizer": {"type": "Lowercase"}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [split(r"\p{L}+"), QWEN3["pre_tokenizer"]["pretokenizers"][1]],
            }
        },
    ],
    ids=["normalizer", "words"],
)
def test_other_files_run_in_a_process(folder, edit):
    edit_file(folder, lambda content: content.update(edit))
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "<|im_start|>user\nA naïve\ncat<|im_end|>\n<|im_start|>assistant\n"
    assert not tokenizer_file.is_known(json.loads((folder / "tokenizer.json").read_text()))
    assert PromptTokenizer(folder).encode("A naïve\ncat", 200) == library.encode(text).ids


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        ({"pre_tokenizer": split("(x+x+)+y")}, "Onig|takes more than"),
        ({"pre_tokenizer": split("(")}, "cannot be used"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": 40
                    * [{"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}],
                }
            },
            "cannot be used|takes more than",
        ),
        (
            {
                "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 3},
                "model": {"type": "WordLevel"},
            },
            "cannot be used",
        ),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "cannot be read"),
        ({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": ["b c"]}}, "cannot be read"),
        ({"model": []}, "cannot be used"),
    ],
    ids=["regex", "pattern", "normalizers", "model", "id", "merge", "list"],
)
def test_files_that_take_too_much_time_or_memory(folder, monkeypatch, edit, pattern):
    monkeypatch.setattr(tokenizer_file, "SECONDS", 3)
    edit_file(folder, lambda content: content.update(edit))
    begin = time.monotonic()
    with pytest.raises(UserError, match=pattern) as error:
        PromptTokenizer(folder).encode("x" * 40, 200)
    message = str(error.value)
    assert "tokenizer.json" in message
    assert "\n" not in message
    assert len(message) < 500
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[" * 200_000),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"added_tokens": {}}'),
        ("tokenizer.json", '{"added_tokens": [{"id": -1, "content": "a"}]}'),
        ("tokenizer.json", '{"added_tokens": [{"id": 1, "content": []}]}'),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "a"}}'),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"' + "9" * 400 + '": {"content": "a"}}}',
        ),
    ],
)
def test_bad_json(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        PromptTokenizer(folder)
    assert "\n" not in str(error.value)


def test_limits_of_prompts_and_queries(folder):
    with pytest.raises(ConfigError, match=r"100,000 .*65,536"):
        PromptTokenizer(folder).encode("x" * 100_000, 200)
    with pytest.raises(UserError, match="999,999,999"):
        PromptTokenizer(folder, tokens_per_step=10**9)
