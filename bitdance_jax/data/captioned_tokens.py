"""Files of captioned tokens: images of one or more resolutions and mixed sizes, with captions.

The files are shards as in `tokens`, beside a manifest. A record is the length of a JSON header,
uint32 little-endian; the header, {"captions": [...], "sizes": {"512": [384, 640], ...}}; and then
for each of these sizes, in the same order, the packed bits of the tokens in raster order. A record
of an image that could not be read has a header {"error": "..."} alone. Tokens do not depend on P.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.config.plain import Count, ImageSide, Natural, Size
from bitdance_jax.data.buckets import Buckets, TooSmall
from bitdance_jax.data.captioned import CaptionedImage, CaptionedSource, Skips, Tokens
from bitdance_jax.data.token_shards import ShardRecords
from bitdance_jax.data.tokens import FORMAT_VERSION, MANIFEST, TokensManifest, shards
from bitdance_jax.errors import ConfigError
from bitdance_jax.io.image_files import DamagedImage


LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class CaptionedManifest(TokensManifest):
    """The contents of a folder of captioned tokens; see TokensManifest.

    Attributes:
      held_out: how many of the records, the last ones, were held out when they were written.
      resolutions: at which the images were encoded, see Buckets.
      size_multiple: of the heights and widths in pixels.
      too_small: what was done with images that do not cover their buckets, see `mixture`.
      images: of the sources, see `captioned_token_writer`.
    """

    holds = "captioned tokens"
    own_field = "resolutions"

    records: Count
    held_out: Natural
    shard_size: Count
    resolutions: tuple[ImageSide, ...]
    size_multiple: Size
    too_small: TooSmall
    tokenizer: TokenizerConfig
    fingerprint: str
    dtype: str
    images: str
    format_version: Natural = FORMAT_VERSION

    def check_sizes(self, folder: str, resolutions: Sequence[int], size_multiple: int) -> None:
        """Checks that samples of these resolutions can be drawn.

        Args:
          folder: of the tokens.
          resolutions: of the samples.
          size_multiple: that the model needs.

        Raises:
          ConfigError: some cannot.
        """
        missing = [str(side) for side in resolutions if side not in self.resolutions]
        if missing:
            raise ConfigError(
                f"data.resolutions draws {', '.join(missing)}, and the tokens in {folder} are of"
                f" {', '.join(map(str, self.resolutions))} pixels; write those too, or change"
                " data.resolutions",
                "data.resolutions",
            )
        for side in resolutions:
            for size in Buckets(side, self.size_multiple).sizes:
                if size[0] % size_multiple or size[1] % size_multiple:
                    raise ConfigError(
                        f"the tokens in {folder} have images of {size[1]}x{size[0]}, and the model"
                        f" needs multiples of {size_multiple} pixels; write them again with"
                        f" size_multiple={size_multiple}"
                    )


def is_captioned_tokens(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a manifest of tokens."""
    return (Path(folder) / MANIFEST).is_file()


def check_encoders(
    sources: Iterable[CaptionedSource], config: TokenizerConfig, params: Any
) -> None:
    """Checks that a model can train on those of the sources that are tokens.

    Args:
      sources: of captioned images.
      config: sizes of the model's tokenizer.
      params: its weights, in float32 or as saved.

    Raises:
      UserError: some are of another tokenizer.
    """
    for source in sources:
        manifest = getattr(source, "manifest", None)
        if isinstance(manifest, CaptionedManifest):
            manifest.check_encoder(source.location, config, params)


class CaptionedTokensSource:
    """Captioned images as tokens; `CaptionedImage.versions` has all resolutions.

    Images that were held out when they were written are so again: `splits` says it.

    Attributes:
      manifest: see CaptionedManifest.

    Raises:
      FileError: the tokens are missing, incomplete or damaged. All of them are read when it opens.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.location = os.fspath(folder)
        self.skipped = Skips()
        self.manifest = CaptionedManifest.read(folder)
        held_out = self.manifest.held_out
        self.splits: Sequence[str] | None = None
        if held_out:
            trained = self.manifest.records - held_out
            self.splits = ["train"] * trained + ["held_out"] * held_out
        self._records = ShardRecords(shards(folder, self.manifest))

    def __len__(self) -> int:
        return self.manifest.records

    def __getitem__(self, index: int) -> CaptionedImage:
        """Raises a DamagedImage if the image could not be read when the tokens were written."""
        tokenizer = self.manifest.tokenizer
        return deserialize(self._records[index], tokenizer.downsampling, -(-tokenizer.bits // 8))

    def captions_of(self, index: int) -> tuple[str, ...]:
        return self[index].captions


def serialize(
    captions: Sequence[str],
    versions: Mapping[int, UInt8[np.ndarray, "h w bytes"]],
    downsampling: int,
) -> bytes:
    """The record of an image: its packed bits by resolution."""
    sizes = {
        str(side): [bits.shape[0] * downsampling, bits.shape[1] * downsampling]
        for side, bits in versions.items()
    }
    header = json.dumps({"captions": list(captions), "sizes": sizes}).encode()
    codes = b"".join(bits.tobytes() for bits in versions.values())
    return LENGTH.pack(len(header)) + header + codes


def serialize_error(message: str) -> bytes:
    """The record of an image that could not be read."""
    header = json.dumps({"error": message}).encode()
    return LENGTH.pack(len(header)) + header


def deserialize(data: bytes, downsampling: int, num_bytes: int) -> CaptionedImage:
    """The image of a record.

    Args:
      data: the record.
      downsampling: of the tokenizer.
      num_bytes: of a token's packed bits.

    Raises:
      DamagedImage: it could not be read when the record was written.
    """
    (length,) = LENGTH.unpack_from(data)
    offset = LENGTH.size + length
    header = json.loads(data[LENGTH.size : offset])
    if "error" in header:
        raise DamagedImage(header["error"])
    versions = {}
    for side, (height, width) in header["sizes"].items():
        shape = height // downsampling, width // downsampling, num_bytes
        count = int(np.prod(shape))
        bits = np.frombuffer(data, np.uint8, count, offset).reshape(shape)
        versions[int(side)] = Tokens(bits, (height, width))
        offset += count
    return CaptionedImage(tuple(header["captions"]), versions=versions)
