"""The files of tokens: array_record files, each with a last record that identifies it."""

import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bitdance_jax.data.array_records import ArrayRecordDataSource, ArrayRecordReader
from bitdance_jax.errors import FileError, UserError


BLOCK = 1024
"""Records read at a time."""

SEAL = struct.Struct("<16sIII")


class Seal(NamedTuple):
    """The last record of a shard.

    Attributes:
      tokens: the first 16 hex digits of the SHA-256 of the folder's manifest.json.
      shard: its number.
      records: number of records before the seal.
      checksum: CRC-32 of their concatenation.
    """

    tokens: str
    shard: int
    records: int
    checksum: int

    def pack(self) -> bytes:
        return SEAL.pack(self.tokens.encode(), self.shard, self.records, self.checksum)

    @classmethod
    def unpack(cls, data: bytes) -> "Seal":
        """Raises a struct.error if the data is no seal."""
        tokens, *numbers = SEAL.unpack(data)
        return cls(tokens.decode(errors="replace"), *numbers)


@dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Attributes:
      path: of the file.
      tokens: see Seal.
      number: from 0.
      records: indices of the images in it.
    """

    path: Path
    tokens: str
    number: int
    records: range

    def seal(self, checksum: int) -> Seal:
        """The seal of its file, if its records have this checksum."""
        return Seal(self.tokens, self.number, len(self.records), checksum)

    def check(self) -> None:
        """Reads the file. Raises a FileError if it is missing, damaged, or not the shard it should
        be."""
        if not self.path.is_file():
            raise FileError(
                f"the tokens in {self.path.parent} are not complete: {self.path.name} is missing; "
                "run the same tokenize command again",
                self.path,
            )
        try:
            found, checksum = _read_seal(self.path)
        except UserError:
            raise
        except (RuntimeError, ValueError, IndexError, struct.error) as error:
            raise damaged(self.path, error) from error
        for name, actual, expected in zip(Seal._fields, found, self.seal(checksum), strict=True):
            if actual != expected:
                raise damaged(self.path, f"{name} is {actual}, not {expected}")

    def is_complete(self) -> bool:
        """Whether `check` raises no error."""
        try:
            self.check()
        except UserError:
            return False
        return True


class ShardRecords:
    """The records of all shards, in order.

    Args:
      shards: all but the last have as many records.

    Raises:
      FileError: a shard is missing or damaged. All of them are read when it opens.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        with ThreadPoolExecutor() as pool:  # Reading and checksums run outside Python's lock.
            list(pool.map(Shard.check, shards))
        self._records = ArrayRecordDataSource(
            [f"{shard.path}[0:{len(shard.records)}]" for shard in shards]
        )

    def __getitem__(self, index: int) -> bytes:
        try:
            return self._records[index]
        except (RuntimeError, ValueError, IndexError) as error:
            shard = self._shards[index // len(self._shards[0].records)]
            raise damaged(shard.path, error) from error


def damaged(shard: Path, reason: object) -> FileError:
    """The error about a damaged shard."""
    text = str(reason).partition(";")[0] or type(reason).__name__
    return FileError(
        f"{shard} is damaged ({text}); run the same tokenize command again, which replaces it",
        shard,
    )


def _read_seal(path: Path) -> tuple[Seal, int]:
    """A shard's seal, and the checksum of the records before it.

    Raises errors of array_record and struct.
    """
    reader = ArrayRecordReader(str(path))
    checksum = 0
    try:
        count = reader.num_records() - 1
        for start in range(0, count, BLOCK):
            for record in reader.read(start, min(start + BLOCK, count)):
                checksum = zlib.crc32(record, checksum)
        return Seal.unpack(reader.read(count, count + 1)[0]), checksum
    finally:
        reader.close()
