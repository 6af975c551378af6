"""Writes the tokens of a source's images (`data.tokens`) on all devices of all processes,
resumably."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import UInt8

from bitdance_jax.config import TokenizerConfig
from bitdance_jax.data import transforms
from bitdance_jax.data.array_records import ArrayRecordWriter
from bitdance_jax.data.loader import BatchIterator, read_undamaged
from bitdance_jax.data.records import ImageSource
from bitdance_jax.data.token_shards import Shard
from bitdance_jax.data.tokens import (
    MANIFEST,
    Manifest,
    TokensManifest,
    Versions,
    encoder_fingerprint,
    images_fingerprint,
    serialize,
    shards,
)
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.io import image_files
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.progress import Progress
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.tokenizer.codes import pack


SHARD_SIZE = 16_384
BATCH_SIZE = 16

Dtype = Literal["float32", "bfloat16"]


_LONG = {"class_names": "of other classes", "held_out": "other images are held out"}
"""How a difference is named in a field whose values are too long for a message."""


def describe(
    source: ImageSource,
    config: TokenizerConfig,
    params: Any,
    *,
    image_size: int,
    versions: Versions = Versions(),
    dtype: Dtype = "float32",
    shard_size: int = SHARD_SIZE,
) -> Manifest:
    """The manifest of the tokens that `tokenize` writes.

    Args:
      source: the images.
      config: of the tokenizer.
      params: its weights in float32.
      image_size: in pixels.
      versions: of each image.
      dtype: that the encoder computes in.
      shard_size: images per file.

    Raises:
      ConfigError: the image size is no multiple of the downsampling.
    """
    if image_size < 1 or image_size % config.downsampling:
        raise ConfigError(
            f"image_size must be a multiple of the tokenizer's downsampling {config.downsampling}, "
            f"got {image_size}",
            "image_size",
        )
    held_out = getattr(source, "held_out", None)
    return Manifest(
        records=len(source),
        shard_size=shard_size,
        class_names=tuple(source.class_names),
        image_size=image_size,
        tokenizer=config,
        fingerprint=encoder_fingerprint(config, params),
        dtype=dtype,
        images=images_fingerprint(source),
        versions=versions,
        held_out=() if held_out is None else tuple(np.flatnonzero(held_out).tolist()),
    )


def prepare(folder: Path, manifest: TokensManifest) -> None:
    """Writes the manifest of a new folder of tokens, or checks that an existing one is the same.

    Raises:
      FileError: the folder has other tokens, or cannot be written to.
    """
    if not (folder / MANIFEST).exists():
        manifest.write(folder)
        return
    found = type(manifest).read(folder)
    if found != manifest:
        name = next(name for name, value in vars(manifest).items() if getattr(found, name) != value)
        change = _LONG.get(
            name, f"{name} was {getattr(found, name)!r}, now {getattr(manifest, name)!r}"
        )
        raise FileError(
            f"{folder} has other tokens ({change}); choose another folder, or delete this one",
            folder,
        )


def tokenize(
    source: ImageSource,
    params: Any,
    *,
    folder: Path,
    manifest: Manifest,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
) -> int:
    """Encodes the missing shards of a folder of tokens, on all devices of this process.

    Of several processes, each writes its own shards.

    Args:
      source: the images.
      params: the tokenizer's weights in float32; the decoder may be missing.
      folder: with the manifest that `prepare` wrote; shared by all processes.
      manifest: from `describe`.
      batch_size: images that a device encodes at a time.
      workers: number of processes that load images.

    Returns:
      The number of images that this process has encoded now.

    Raises:
      FileError: the folder cannot be written to.
    """
    pending, done = missing_shards(folder, manifest)
    indices = np.array([index for shard in pending for index in shard.records], np.int64)
    if not len(indices):
        return 0

    devices = Mesh(jax.local_devices(), "data", axis_types=(AxisType.Auto,))
    versions = manifest.versions
    images = min(max(1, batch_size * devices.size // versions.count), manifest.records)
    loader = BatchIterator(
        _Crops(source, indices, manifest.image_size, versions),
        len(indices),
        images,
        workers=workers,
    )
    records = _serialized(loader, _encoder(manifest, params, devices, images * versions.count))
    write_shards(pending, records, done)
    loader.close()
    return len(indices)


def missing_shards(folder: Path, manifest: TokensManifest) -> tuple[list[Shard], int]:
    """The shards that this process has to write, and the number of records in those it has
    written."""
    own = shards(folder, manifest)[jax.process_index() :: jax.process_count()]
    pending = [shard for shard in own if not shard.is_complete()]
    counts = [sum(len(shard.records) for shard in part) for part in (own, pending)]
    return pending, counts[0] - counts[1]


def write_shards(pending: Sequence[Shard], records: Iterator[bytes], done: int) -> None:
    """Writes shards from their records in order; shows progress, after `done` records.

    Raises:
      FileError: the folder cannot be written to.
    """
    count = sum(len(shard.records) for shard in pending)
    with Progress(done + count, "image", "encoding", initial=done) as bar:
        for shard in pending:
            with write_shard(shard) as write:
                for record in itertools.islice(records, len(shard.records)):
                    write(record)
                    bar.advance(1)


class _Crops:
    """All versions of the images of a source with the given indices:
    {"image": uint8 [versions, size, size, 3], "label"}."""

    def __init__(
        self, source: ImageSource, indices: np.ndarray, image_size: int, versions: Versions
    ) -> None:
        self._source = source
        self._indices = indices
        self._size = image_size
        self._versions = versions

    def __call__(self, position: int) -> tuple[dict[str, Any], tuple[str, ...]]:
        index = int(self._indices[position])
        versions = self._versions
        record, skipped = read_undamaged(self._source, index)
        centre = transforms.centre_crop(record["image"], self._size)
        crops = [centre, centre[:, ::-1]] if versions.flips else [centre]
        for version in range(versions.crops):
            rng = np.random.default_rng((versions.seed, version, index))
            crops.append(transforms.augment(record["image"], self._size, versions.augment, rng=rng))
        return {"image": np.stack(crops), "label": np.int32(record["label"])}, skipped


Encoder = Callable[[UInt8[np.ndarray, "B V H W 3"]], jax.Array]


def _encoder(manifest: Manifest, params: Any, devices: Mesh, images: int) -> Encoder:
    """Returns a function that encodes images to packed bits, or float16 numbers, as bytes [at least
    B * V, h, w, bytes], sharded over the devices.

    It pads every batch to `images` images, rounded up to a multiple of the devices, so that one
    shape is compiled.
    """
    dtype = jnp.dtype(manifest.dtype)
    model = Autoencoder(manifest.tokenizer, dtype)
    weights = jax.device_put(
        {"encoder": jax.tree.map(lambda a: jnp.asarray(a, dtype), params["encoder"])},
        NamedSharding(devices, P()),
    )
    rows = NamedSharding(devices, P("data"))
    padded = -(-images // devices.size) * devices.size

    @jax.jit
    def encode(weights: Any, flat: jax.Array) -> jax.Array:
        z: Any = model.apply({"params": weights}, image_files.to_model(flat), method="encode")
        return pack(z, manifest.tokenizer)

    def encode_batch(batch: UInt8[np.ndarray, "B V H W 3"]) -> jax.Array:
        flat = batch.reshape(-1, *batch.shape[2:])
        flat = np.pad(flat, ((0, padded - len(flat)), (0, 0), (0, 0), (0, 0)))
        return encode(weights, jax.device_put(flat, rows))

    return encode_batch


def _serialized(loader: BatchIterator, encode: Encoder) -> Iterator[bytes]:
    """One record per image. A batch is loaded while the devices encode the previous one."""
    waiting: tuple[np.ndarray, int, jax.Array] | None = None
    for batch in itertools.chain(loader, [None]):
        encoding = None
        if batch is not None:
            encoding = batch["label"], batch["image"].shape[1], encode(batch["image"])
        if waiting is not None:
            labels, versions, codes = waiting
            packed = np.asarray(codes)[: len(labels) * versions]
            yield from map(
                serialize, labels.tolist(), packed.reshape(len(labels), versions, *packed.shape[1:])
            )
        waiting = encoding


@contextmanager
def write_shard(shard: Shard) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that writes the next record of a shard.

    The file appears under its name when the block ends, if it is complete.
    """
    checksum = 0

    def write(record: bytes) -> None:
        nonlocal checksum
        writer.write(record)
        checksum = zlib.crc32(record, checksum)

    try:
        with replace_file(shard.path, "the tokens ") as partial:
            # Records are read one at a time, and bits cannot be compressed.
            writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
            try:
                yield write
                writer.write(shard.seal(checksum).pack())
            finally:
                writer.close()
            if not replace(shard, path=partial).is_complete():
                raise FileError(
                    f"cannot write the tokens {shard.path}: the file is damaged after writing; "
                    "is the disk full?",
                    shard.path,
                )
    except jax.errors.JaxRuntimeError:  # A RuntimeError, but of the device.
        raise
    except RuntimeError as error:
        text = str(error).partition(";")[0]
        raise FileError(f"cannot write the tokens {shard.path}: {text}", shard.path) from error
