"""The array_record package, which has no wheels for Windows: there its classes raise an error on
use."""

from typing import Any, NoReturn

from bitdance_jax.errors import UserError


try:
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
except ImportError:

    def _missing(*_: Any) -> NoReturn:
        raise UserError(
            "precomputed tokens and data.cache_latents need the package array_record, which is not "
            "installed and has no wheels for Windows; use Linux, macOS or WSL, or train from images"
        )

    ArrayRecordDataSource = ArrayRecordReader = ArrayRecordWriter = _missing


__all__ = ["ArrayRecordDataSource", "ArrayRecordReader", "ArrayRecordWriter"]
