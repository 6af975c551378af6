"""Writes captioned tokens (`data.captioned_tokens`) of mixed sizes on all devices of all processes,
resumably."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.data.buckets import Buckets, TooSmall
from bitdance_jax.data.captioned import CaptionedImage, CaptionedSource
from bitdance_jax.data.captioned_encoding import encoded_images
from bitdance_jax.data.captioned_tokens import CaptionedManifest, serialize, serialize_error
from bitdance_jax.data.image_encoder import ImageEncoder
from bitdance_jax.data.token_writer import SHARD_SIZE, Dtype, missing_shards, write_shards
from bitdance_jax.data.tokens import PROBES, encoder_fingerprint
from bitdance_jax.errors import ConfigError
from bitdance_jax.io.image_files import DamagedImage


class Joined:
    """Several sources one after the other."""

    def __init__(self, sources: Sequence[CaptionedSource]) -> None:
        self._sources = tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[number][index - (int(self._ends[number - 1]) if number else 0)]


def describe_captioned(
    train: Sequence[CaptionedSource],
    held_out: Sequence[CaptionedSource],
    config: TokenizerConfig,
    params: Any,
    *,
    resolutions: Sequence[int],
    size_multiple: int,
    too_small: TooSmall = "upscale",
    dtype: Dtype = "float32",
    shard_size: int = SHARD_SIZE,
) -> CaptionedManifest:
    """The manifest of the tokens that `tokenize_captioned` writes.

    Args:
      train, held_out: the images; the latter may be none.
      config: of the tokenizer.
      params: its weights in float32.
      resolutions: at which each image is encoded.
      size_multiple: of heights and widths.
      too_small: see `mixture.Mixture`; "skip" leaves out the version of that resolution.
      dtype: that the encoder computes in.
      shard_size: images per file.

    Raises:
      ConfigError: the sizes are no multiples of the tokenizer's downsampling, or a resolution is
        none of `size_multiple`; or a source has tokens and no images.
    """
    for source in (*train, *held_out):
        if getattr(source, "manifest", None) is not None:
            raise ConfigError(
                f"{source.location} has tokens already; name the images that they are made from",
                "data.paths",
            )
    if size_multiple % config.downsampling:
        raise ConfigError(
            f"size_multiple must be a multiple of the tokenizer's downsampling"
            f" {config.downsampling}, got {size_multiple}",
            "size_multiple",
        )
    for side in resolutions:
        Buckets(side, size_multiple)
    images = Joined([*train, *held_out])
    return CaptionedManifest(
        records=len(images),
        held_out=sum(map(len, held_out)),
        shard_size=shard_size,
        resolutions=tuple(resolutions),
        size_multiple=size_multiple,
        too_small=too_small,
        tokenizer=config,
        fingerprint=encoder_fingerprint(config, params),
        dtype=dtype,
        images=_fingerprint(images),
    )


def tokenize_captioned(
    train: Sequence[CaptionedSource],
    held_out: Sequence[CaptionedSource],
    params: Any,
    *,
    folder: Path,
    manifest: CaptionedManifest,
    workers: int = 0,
) -> int:
    """Encodes the missing shards of a folder of captioned tokens, on all devices of this process.

    Of several processes, each writes its own shards. An image that cannot be read is named on
    stderr; its record says so.

    Args:
      train, held_out: the images.
      params: the tokenizer's weights in float32; the decoder may be missing.
      folder: with the manifest that `token_writer.prepare` wrote; shared by all processes.
      manifest: from `describe_captioned`.
      workers: number of processes that load images; 0: threads of this one.

    Returns:
      The number of images that this process has encoded now.

    Raises:
      FileError: the folder cannot be written to, or too many images are damaged.
    """
    pending, done = missing_shards(folder, manifest)
    indices = [index for shard in pending for index in shard.records]
    if not indices:
        return 0
    encoder = ImageEncoder(manifest.tokenizer, params, manifest.dtype)
    records = encoded_images(
        Joined([*train, *held_out]),
        indices,
        encoder,
        resolutions=manifest.resolutions,
        size_multiple=manifest.size_multiple,
        too_small=manifest.too_small,
        workers=workers,
    )
    down = manifest.tokenizer.downsampling
    write_shards(pending, (_serialized(record, down) for record in records), done)
    return len(indices)


def _serialized(record: CaptionedImage | DamagedImage, downsampling: int) -> bytes:
    if isinstance(record, DamagedImage):
        return serialize_error(str(record))
    assert record.versions is not None
    bits = {side: tokens.bits for side, tokens in record.versions.items()}
    return serialize(record.captions, bits, downsampling)


def _fingerprint(images: Joined) -> str:
    """16 hex digits that identify the images: a hash of their number and of a few of them."""
    digest = hashlib.sha256(str(len(images)).encode())
    for index in np.linspace(0, len(images) - 1, PROBES).astype(int).tolist():
        try:
            record = images[index]
            digest.update(repr(record.captions).encode() + record.image.tobytes())
        except DamagedImage:
            digest.update(b"damaged")
    return digest.hexdigest()[:16]
