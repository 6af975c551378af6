"""Files from elsewhere: unexpected content is a FileError of one line."""

import json
import os
from dataclasses import dataclass
from typing import Any

import pytest

from bitdance_jax.errors import FileError, short
from bitdance_jax.io import readers


@dataclass(frozen=True)
class Manifest:
    rows: int
    shares: tuple[float, ...] = ()
    name: str | None = None


def test_typed_json(tmp_path):
    (tmp_path / "manifest.json").write_text('{"rows": 3, "shares": [1, 0.5]}')
    manifest = readers.read_json(tmp_path / "manifest.json", Manifest)
    assert manifest == Manifest(3, (1.0, 0.5))
    assert isinstance(manifest.shares[0], float)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_removed(tmp_path, mark):
    (tmp_path / "x").write_bytes(mark + '{"name": "é"}'.encode())
    assert readers.read_json(tmp_path / "x") == {"name": "é"}
    assert readers.read_text(tmp_path / "x") == '{"name": "é"}'


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" * 200_000, "nested"),
        (b'{"rows": {"a": 1}}', "rows: .* int"),
        (b"[]", "object"),
        (b'{"rows": [3]}', "rows: .* int"),
        (b'{"rows": true}', "rows: .* int"),
        (b'{"rows": 3.0}', "rows: .* int"),
        (b'{"rows": NaN}', "malformed"),
        (b'{"rows": 1, "shares": [-Infinity]}', "malformed"),
        (b'{"rows": 1, "shares": [1e999]}', "out of range"),
        (b'{"rows": 1, "shares": [' + b"9" * 400 + b"]}", "out of range"),
        (b'{"rows": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"rows": 1, "name": 5}', "name: .* str"),
        (b"{}", "rows"),
        (b"", "truncated"),
        (b'{"rows": 1} x', "trailing"),
        (b'{"rows": 1, "name": "\xff"}', "UTF-8"),
        (b'\xff\xfe{\x00"\x00', "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b" " * (readers.MAX_BYTES + 1), f"{readers.MAX_BYTES:,} bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_other_content(tmp_path, data, reason):
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(FileError, match=reason) as error:
        readers.read_json(tmp_path / "manifest.json", Manifest)
    assert "manifest.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "[" * 200_000 + "]" * 200_000, '{"a":' * 200_000, "[" * 101 + "]" * 101]
)
def test_deep_nesting(text):
    with pytest.raises(FileError, match=r"record\.json .* nested"):
        readers.decode_json(text, Any, where="record.json")


MANY_BRACKETS = "[" + ",".join(["[]"] * 1000) + "]"
BRACKETS_IN_STRINGS = json.dumps({"[" * 1000: "\\" + '"[{' * 1000, "b": ["]" * 500 + "\\"]})
DEEPEST = "[" * readers.MAX_DEPTH + "]" * readers.MAX_DEPTH


@pytest.mark.parametrize("text", [MANY_BRACKETS, BRACKETS_IN_STRINGS, DEEPEST])
def test_nesting_within_the_limit(text):
    assert readers.decode_json(text, Any, where="it") == json.loads(text)


def test_duplicate_keys():
    """Also those of nested objects."""
    text = '{"a": {"x": 1, "x": 2}, "b": 1, "b": 2}'
    assert readers.decode_json(text, where="record.json") == {"a": {"x": 2}, "b": 2}
    with pytest.raises(FileError, match=r"record\.json .* x, b"):
        readers.decode_json(text, where="record.json", unique=True)


@pytest.mark.parametrize("name", ["missing", "a\0b", "x" * 5000, "folder", "file/x"])
def test_names_of_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(FileError) as error:
        readers.read_bytes(os.path.join(tmp_path, name))
    assert isinstance(error.value, readers.MissingFile) == (name in ("missing", "file/x"))


def test_pipes_and_devices_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(FileError, match=str(path)):
            readers.read_bytes(path)


def test_short():
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert len(short(deep)) < 30
    assert len(short("a" * 10**6)) < 70
    assert len(short(list(range(10**5)))) < 70
    assert short({"type": "yarn"}) == "{'type': 'yarn'}"
    assert short(0.5) == "0.5"
