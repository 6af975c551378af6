"""Files of torch.save before PyTorch 1.6: one of PyTorch, and damaged and hostile variants."""

import os
import pickle

import numpy as np
import pytest
from golden_models import GOLDEN

from bitdance_jax.convert import legacy_torch_file
from bitdance_jax.errors import FileError


WRITTEN_BY_TORCH = GOLDEN / "evaluation" / "legacy.pth"


def test_tensors():
    """A state dict with several dtypes, a scalar, and PyTorch's `_metadata`."""
    state = legacy_torch_file.load(WRITTEN_BY_TORCH)
    arrays = {name: array.read() for name, array in state.items()}
    np.testing.assert_array_equal(
        arrays["conv.weight"], np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 8
    )
    np.testing.assert_array_equal(arrays["bn.bias"], np.array([1.5, -2], np.float16))
    assert arrays["bn.num_batches_tracked"] == 7 and len(arrays) == 3
    assert {name: (array.shape, array.dtype) for name, array in state.items()} == {
        n: (a.shape, a.dtype) for n, a in arrays.items()
    }


def test_is_legacy(tmp_path):
    assert legacy_torch_file.is_legacy(WRITTEN_BY_TORCH)
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04")
    assert not legacy_torch_file.is_legacy(tmp_path / "x.pth")


def file_of(content, keys=(), storages=b""):
    """A file of the format that contains `content`."""
    parts = [
        legacy_torch_file.MAGIC,
        legacy_torch_file.VERSION,
        {"little_endian": True},
        content,
        list(keys),
    ]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts) + storages


class Hostile:
    def __reduce__(self):
        return os.system, ("echo hacked > hacked",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (WRITTEN_BY_TORCH.read_bytes()[:-1], "truncated: 815 bytes instead of at least 816"),
        (WRITTEN_BY_TORCH.read_bytes()[:300], r"damaged|truncated"),
        (legacy_torch_file.START, r"damaged|truncated"),
        (
            WRITTEN_BY_TORCH.read_bytes()
            .replace(b"little_endian\x94", b"")
            .replace(b"little_endianq", b"little_endiaMq"),
            "little-endian",
        ),
        (file_of([1, 2]), "state dict"),
        (file_of({}, ["0"]), "'0'"),
        (file_of(Hostile()), "posix.system|nt.system"),
        (file_of({"weights": Hostile()}), "hostile, nothing was run"),
    ],
)
def test_damaged_and_hostile_files(tmp_path, monkeypatch, data, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(FileError, match=reason) as caught:
        legacy_torch_file.load(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)
    assert "x.pth" in str(caught.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x02K\x03K\x02K\x02", b"K\x09K\x03K\x02K\x02"),
        (b"(K\x0cK\x04K\x02K\x01", b"(K\x7fK\x04K\x02K\x01"),
    ],
    ids=["size", "stride"],
)
def test_tensors_outside_of_their_storage(tmp_path, old, new):
    data = WRITTEN_BY_TORCH.read_bytes()
    assert data.count(old) == 1
    (tmp_path / "x.pth").write_bytes(data.replace(old, new))
    with pytest.raises(FileError, match="outside its storage"):
        legacy_torch_file.load(tmp_path / "x.pth")
