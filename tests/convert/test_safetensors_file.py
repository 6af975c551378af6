"""Safetensors files and their index, damaged and hostile."""

import json

import numpy as np
import pytest

from bitdance_jax.convert import safetensors_file
from bitdance_jax.errors import FileError


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, numbers=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(
        (len(text) if length is None else length).to_bytes(8, "little") + text + numbers
    )
    return path


def test_further_fields_of_an_entry_are_ignored(tmp_path):
    path = write(
        tmp_path / "x.safetensors",
        {"a": ENTRY | {"note": [1]}, "__metadata__": {"format": "pt"}},
        np.arange(2.0, dtype="f4").tobytes(),
    )
    file = safetensors_file.load(path)
    assert file.tensors["a"].read().tolist() == [0, 1] and file.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b"{" + b" " * 10 + b"]",
        {"a": []},
        {"a": {"dtype": "F32"}},
        {"a": ENTRY | {"dtype": "F4"}},
        {"a": ENTRY | {"dtype": "C64"}},
        {"a": ENTRY | {"dtype": []}},
        {"a": ENTRY | {"shape": [-2]}},
        {"a": ENTRY | {"shape": [2.0]}},
        {"a": ENTRY | {"shape": [2**62, 2**62]}},
        {"a": ENTRY | {"shape": [10**400]}},
        {"a": ENTRY | {"data_offsets": [8, 0]}},
        {"a": ENTRY | {"data_offsets": [0]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}},
        {"a": ENTRY, "__metadata__": {"format": 1}},
        {"a": ENTRY, "__metadata__": []},
    ],
)
def test_bad_headers(tmp_path, header):
    with pytest.raises(FileError, match=r"x\.safetensors") as error:
        safetensors_file.load(write(tmp_path / "x.safetensors", header))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_lengths_of_a_header(tmp_path, length):
    with pytest.raises(FileError, match=r"x\.safetensors"):
        safetensors_file.load(write(tmp_path / "x.safetensors", {"a": ENTRY}, length=length))


@pytest.mark.parametrize(
    "names", [["a\0b"], ["x" * 5000], ["/dev/zero"], [""], [".."], [3], {}, "x", None]
)
def test_an_index_of_other_files(tmp_path, names):
    weight_map = (
        {str(i): name for i, name in enumerate(names)} if isinstance(names, list) else names
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileError, match=r"index\.json"):
        safetensors_file.load_shards(tmp_path, "model")
