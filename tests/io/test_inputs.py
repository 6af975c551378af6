"""Files from outside: what is no file, no text and no JSON of the expected kind is a UserError of one line, at once."""

import json
import os
from dataclasses import dataclass
from typing import Any

import pytest

from bitdance_jax.errors import UserError, short
from bitdance_jax.io import inputs


@dataclass(frozen=True)
class Journal:
    rows: int
    shares: tuple[float, ...] = ()
    name: str | None = None


def test_typed_json(tmp_path):
    (tmp_path / "journal.json").write_text('{"rows": 3, "shares": [1, 0.5]}')
    journal = inputs.read_json(tmp_path / "journal.json", Journal)
    assert journal == Journal(3, (1.0, 0.5)) and isinstance(journal.shares[0], float)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_content(tmp_path, mark):
    (tmp_path / "x").write_bytes(mark + '{"name": "é"}'.encode())
    assert inputs.read_json(tmp_path / "x") == {"name": "é"}
    assert inputs.read_text(tmp_path / "x") == '{"name": "é"}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"rows": {"a": 1}}', "rows: Expected int, got object"),
        (b"[]", "Expected object, got array"),
        (b'{"rows": [3]}', "rows: Expected int, got array"),
        (b'{"rows": true}', "rows: Expected int, got bool"),
        (b'{"rows": 3.0}', "rows: Expected int, got float"),
        (b'{"rows": NaN}', "malformed"),
        (b'{"rows": 1, "shares": [-Infinity]}', "malformed"),
        (b'{"rows": 1, "shares": [1e999]}', "Number out of range"),
        (b'{"rows": 1, "shares": [' + b"9" * 400 + b"]}", "Number out of range"),
        (b'{"rows": ' + b"9" * 5000 + b"}", "Integer value out of range"),
        (b'{"rows": 1, "name": 5}', "name: Expected str . null, got int"),
        (b"{}", "missing required field rows"),
        (b"", "truncated"),
        (b'{"rows": 1} x', "trailing"),
        (b'{"rows": 1, "name": "\xff"}', "not UTF-8 text"),
        (b'\xff\xfe{\x00"\x00', "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b" " * (inputs.MAX_BYTES + 1), "larger than such files are"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_other_content(tmp_path, data, message):
    (tmp_path / "journal.json").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        inputs.read_json(tmp_path / "journal.json", Journal)
    assert "journal.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "[" * 200_000 + "]" * 200_000, '{"a":' * 200_000, "[" * 101 + "]" * 101]
)
def test_deep_nesting(text):
    with pytest.raises(UserError, match="it cannot be read: it is nested too deeply"):
        inputs.decode_json(text, Any, where="it")


def test_what_is_not_deep():
    """Many brackets beside each other or in a string, and the deepest that is read."""
    many = "[" + ",".join(["[]"] * 1000) + "]"
    for text in (
        many,
        json.dumps({"[" * 1000: "\\" + '"[{' * 1000, "b": ["]" * 500 + "\\"]}),
        "[" * 100 + "]" * 100,
    ):
        assert inputs.decode_json(text, Any, where="it") == json.loads(text)


def test_second_keys():
    """Of nested objects, too, where they matter."""
    text = '{"a": {"x": 1, "x": 2}, "b": 1, "b": 2}'
    assert inputs.decode_json(text, where="it") == {"a": {"x": 2}, "b": 2}
    with pytest.raises(UserError, match="it has a second key x, a second key b"):
        inputs.decode_json(text, where="it", unique=True)


@pytest.mark.parametrize("name", ["missing", "a\0b", "x" * 5000, "folder", "file/x"])
def test_names_of_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        inputs.read_bytes(os.path.join(tmp_path, name))
    assert isinstance(error.value, inputs.MissingFile) == (name in ("missing", "file/x"))


def test_pipes_and_devices_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="is not a file"):
            inputs.read_bytes(path)


def test_short_messages():
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert (
        len(short(deep)) < 30
        and len(short("a" * 10**6)) < 70
        and len(short(list(range(10**5)))) < 70
    )
    assert short({"type": "yarn"}) == "{'type': 'yarn'}" and short(0.5) == "0.5"
