"""Tensors and storages as a PyTorch file describes them, with checks of what they claim."""

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from bitdance_jax.errors import FileError, short


STORAGE_TYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}

MAX_REPEATED = 2**20
"""Size limit of a tensor that repeats its storage, as PyTorch's `expand` makes it."""


class Storage(NamedTuple):
    """An array in the file, under the name `data/{key}`.

    Attributes:
      dtype: of its elements.
      key: its name.
      size: number of elements.
    """

    dtype: np.dtype
    key: str
    size: int


class Tensor(NamedTuple):
    """A view of a storage. Its values come from the file and are untrusted before `check`.

    Attributes:
      storage: the storage.
      offset: first element.
      shape: of the tensor.
      stride: in elements, along each axis.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def check(self) -> None:
        """Raises a FileError if the view is invalid or reaches outside its storage."""
        storage, offset, shape, stride = self
        name = f"storage {short(storage.key)}"
        described = f"sizes {short(shape)}, strides {short(stride)}, offset {short(offset)}"
        sizes = [storage.size, offset, *shape, *stride]
        if not all(is_size(size) for size in sizes) or len(shape) != len(stride):
            raise FileError(f"a tensor of {name} has invalid {described}")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 not in shape and last >= storage.size:
            raise FileError(f"a tensor reaches outside its {name}: {described}")
        if math.prod(shape) > max(storage.size, MAX_REPEATED):
            raise FileError(f"a tensor repeats its {name} too often: {described}")

    def view(self, elements: np.ndarray) -> np.ndarray:
        """The tensor, given the elements of its storage. `check` it first."""
        strides = [step * self.storage.dtype.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(
            elements[self.offset :], self.shape, strides, writeable=False
        )


def is_size(value: Any) -> bool:
    """Whether a value is an integer that a size, a stride or an offset can be."""
    return type(value) is int and 0 <= value < 2**62
