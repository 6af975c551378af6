"""Arrays that are read only while Orbax writes them."""

import jax
import numpy as np

from bitdance_jax.io import lazy_array, model_folder
from bitdance_jax.io.lazy_array import LazyArray


def test_batches_are_saved_like_numpy_arrays(tmp_path, monkeypatch):
    """Each array is read once, and the checkpoint is the same as one of numpy arrays."""
    rng = np.random.default_rng(0)
    arrays = {
        f"a{i}": {"kernel": rng.standard_normal((size, 3)).astype(np.float32)}
        for i, size in enumerate((5, 1, 1, 40, 2, 7))
    }
    reads: list[tuple[int, ...]] = []

    def unread(array: np.ndarray) -> LazyArray:
        return LazyArray(array.shape, array.dtype, lambda: reads.append(array.shape) or array)

    monkeypatch.setattr(lazy_array, "BATCH_BYTES", 100)
    model_folder.save(
        tmp_path / "lazy",
        kind="tokenizer",
        config={},
        params=jax.tree.map(unread, arrays),
        metadata={},
    )
    assert sorted(reads) == sorted(value["kernel"].shape for value in arrays.values())
    model_folder.save(tmp_path / "numpy", kind="tokenizer", config={}, params=arrays, metadata={})
    for name in ("lazy", "numpy"):
        jax.tree.map(
            np.testing.assert_array_equal, model_folder.load(tmp_path / name).params, arrays
        )
    trees = [(tmp_path / name / "weights" / "_METADATA").read_text() for name in ("lazy", "numpy")]
    assert trees[0] == trees[1]


def test_orbax_still_calls_the_overridden_method(tmp_path, monkeypatch):
    """`_open_and_write` is private to Orbax: without it a complete array is in memory at once."""
    written: list[tuple[int, ...]] = []
    original = lazy_array._BatchWriter._open_and_write

    async def spy(self, value, *arguments):
        written.append(value.shape)
        await original(self, value, *arguments)

    monkeypatch.setattr(lazy_array._BatchWriter, "_open_and_write", spy)
    array = LazyArray((3, 5), np.dtype(np.float32), lambda: np.ones((3, 5), np.float32))
    model_folder.save(
        tmp_path / "model", kind="tokenizer", config={}, params={"a": array}, metadata={}
    )
    assert written == [(3, 5)], (
        "this Orbax writes arrays by another method:"
        " find it in type_handlers.NumpyHandler.serialize and rename that of _BatchWriter"
    )


def test_batch_sizes(monkeypatch):
    monkeypatch.setattr(lazy_array, "BATCH_BYTES", 10)
    assert list(lazy_array._batches([4, 6, 1, 30, 9, 1])) == [
        slice(0, 2),
        slice(2, 3),
        slice(3, 4),
        slice(4, 6),
    ]


def test_stacks_are_written_layer_by_layer(tmp_path, monkeypatch):
    """Large arrays are split into chunks. Each layer of a stack is read once, in order."""
    monkeypatch.setattr(lazy_array, "BATCH_BYTES", 100)
    monkeypatch.setattr(lazy_array, "CHUNK_BYTES", 64)
    rng = np.random.default_rng(0)
    arrays = {
        "stack": rng.standard_normal((2, 3, 5, 7)).astype(np.float32),
        "one": rng.standard_normal((11, 9)),
        "scalar": np.ones(()),
    }
    reads: list[tuple[int, ...]] = []

    def stack(*index: int) -> np.ndarray:
        reads.append(index)
        return arrays["stack"][index]

    params = {
        "stack": LazyArray((2, 3, 5, 7), np.dtype(np.float32), stack, stacked_axes=2),
        "one": LazyArray((11, 9), np.dtype(np.float64), lambda: arrays["one"]),
        "scalar": LazyArray((), np.dtype(np.float64), lambda: arrays["scalar"]),
    }
    assert [value.chunk_shape() for value in params.values()] == [(1, 1, 3, 4), (2, 3), ()]
    model_folder.save(tmp_path / "model", kind="tokenizer", config={}, params=params, metadata={})
    jax.tree.map(
        np.testing.assert_array_equal, model_folder.load(tmp_path / "model").params, arrays
    )
    assert reads == list(np.ndindex(2, 3))
