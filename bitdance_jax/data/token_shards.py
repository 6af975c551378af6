"""The files that tokens lie in: array_record, each with a last record that says what it is."""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bitdance_jax.data.array_records import ArrayRecordReader
from bitdance_jax.errors import UserError


BLOCK = 1024
"""Records read at a time."""

SEAL = struct.Struct("<16sIII")


class Seal(NamedTuple):
    """What a shard says of itself.

    Attributes:
      tokens: of which ones it is: the first 16 hex digits of the SHA-256 of their manifest.json.
      shard: its number.
      records: how many come before the seal.
      checksum: CRC-32 of those, one after the other.
    """

    tokens: str
    shard: int
    records: int
    checksum: int

    def pack(self) -> bytes:
        return SEAL.pack(self.tokens.encode(), self.shard, self.records, self.checksum)

    @classmethod
    def unpack(cls, data: bytes) -> "Seal":
        """Raises a struct.error where it is none."""
        tokens, *numbers = SEAL.unpack(data)
        return cls(tokens.decode(errors="replace"), *numbers)


@dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Attributes:
      path: of the file.
      tokens: see Seal.
      number: from 0.
      records: numbers of the images in it.
    """

    path: Path
    tokens: str
    number: int
    records: range

    def seal(self, checksum: int) -> Seal:
        """That its file ends with if its records have this checksum."""
        return Seal(self.tokens, self.number, len(self.records), checksum)

    def check(self) -> None:
        """Reads the file. Raises a UserError if it is missing, damaged, or another one than its name says."""
        if not self.path.is_file():
            raise UserError(
                f"the tokens in {self.path.parent} are not finished: {self.path.name} is missing; run the same tokenize command again"
            )
        try:
            found, checksum = _read_seal(self.path)
        except UserError:
            raise
        except (RuntimeError, ValueError, IndexError, struct.error) as error:
            raise damaged(self.path, error) from error
        for name, there, wanted in zip(Seal._fields, found, self.seal(checksum), strict=True):
            if there != wanted:
                raise damaged(self.path, f"{name} is {there}, not {wanted}")

    def is_whole(self) -> bool:
        """Whether `check` finds nothing."""
        try:
            self.check()
        except UserError:
            return False
        return True


def damaged(shard: Path, reason: object) -> UserError:
    """The complaint about a shard."""
    said = str(reason).partition(";")[0] or type(reason).__name__
    return UserError(
        f"{shard} is damaged ({said}); run the same tokenize command again, which makes it anew"
    )


def _read_seal(path: Path) -> tuple[Seal, int]:
    """A shard's seal, and the checksum of the records before it; raises array_record's errors, or one of `struct`."""
    reader, checksum = ArrayRecordReader(str(path)), 0
    try:
        count = reader.num_records() - 1
        for start in range(0, count, BLOCK):
            for record in reader.read(start, min(start + BLOCK, count)):
                checksum = zlib.crc32(record, checksum)
        return Seal.unpack(reader.read(count, count + 1)[0]), checksum
    finally:
        reader.close()
