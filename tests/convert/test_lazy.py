"""Arrays that Orbax reads only when it writes them."""

import jax
import numpy as np

from bitdance_jax import model_folder
from bitdance_jax.convert import lazy
from bitdance_jax.convert.lazy import LazyArray


def test_batches_are_saved_like_arrays(tmp_path, monkeypatch):
    """Each array is read once, however the batches fall, and the checkpoint is like one of numpy arrays."""
    rng = np.random.default_rng(0)
    arrays = {f"a{i}": {"kernel": rng.standard_normal((size, 3)).astype(np.float32)} for i, size in enumerate((5, 1, 1, 40, 2, 7))}
    reads: list[tuple[int, ...]] = []

    def unread(array: np.ndarray) -> LazyArray:
        return LazyArray(array.shape, array.dtype, lambda: reads.append(array.shape) or array)

    monkeypatch.setattr(lazy, "BATCH_BYTES", 100)
    lazy.register()
    model_folder.save(tmp_path / "lazy", kind="tokenizer", config={}, params=jax.tree.map(unread, arrays), metadata={})
    assert sorted(reads) == sorted(value["kernel"].shape for value in arrays.values())
    model_folder.save(tmp_path / "numpy", kind="tokenizer", config={}, params=arrays, metadata={})
    for name in ("lazy", "numpy"):
        jax.tree.map(np.testing.assert_array_equal, model_folder.load(tmp_path / name).params, arrays)
    trees = [(tmp_path / name / "weights" / "_METADATA").read_text() for name in ("lazy", "numpy")]
    assert trees[0] == trees[1]


def test_batches_hold_what_fits(monkeypatch):
    monkeypatch.setattr(lazy, "BATCH_BYTES", 10)
    assert list(lazy._batches([4, 6, 1, 30, 9, 1])) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
