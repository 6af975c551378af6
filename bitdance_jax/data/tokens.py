"""Files of precomputed tokens: array_record shards, and a manifest of images, tokenizer and
options.

A record is the label, int32 little-endian, and the packed bits of each version of the image, uint8
[versions, h, w, bytes]: 8 bits per byte, the first is the highest, 1 for a code of 1 and 0 for -1;
an incomplete last byte ends in zeros. The versions are the centre crop, with `flips` its mirror
image, and then the `crops` random ones. The last record of a shard is its `token_shards.Seal`,
which detects damaged and misplaced files.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import UInt8

from bitdance_jax.config import AugmentConfig, Config, TokenizerConfig, from_dict, to_dict
from bitdance_jax.config.plain import Count, Natural, Seed, Size
from bitdance_jax.data.records import ImageSource
from bitdance_jax.data.token_shards import Shard, ShardRecords
from bitdance_jax.errors import FileError, UserError
from bitdance_jax.io import readers
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.image_files import DamagedImage


MANIFEST = "manifest.json"
FORMAT_VERSION = 3
LABEL = np.dtype("<i4")
PROBES = 8
"""Number of images that identify a source."""


@dataclass(frozen=True)
class Versions(Config):
    """Which versions of an image are stored as tokens, besides its centre crop.

    Attributes:
      flips: also the mirror image of the centre crop; training then uses it for a centre crop with
        probability `AugmentConfig.flip`.
      crops: number of random crops; training uses one of them wherever it uses a random crop.
      augment: of the random crops, flips included.
      seed: of the random crops: version v of an image is the crop of epoch v in a loader with this
        seed.
    """

    flips: bool = False
    crops: Natural = 0
    augment: AugmentConfig = AugmentConfig()
    seed: Seed = 0

    @property
    def count(self) -> int:
        return 1 + self.flips + self.crops


AnyManifest = TypeVar("AnyManifest", bound="TokensManifest")


class TokensManifest(Config):
    """What the manifests of all folders of tokens share.

    Attributes:
      records: number of images; all shards but the last have `shard_size` of them, in order.
      shard_size: images per shard.
      tokenizer: its sizes.
      fingerprint: of its encoder, see `encoder_fingerprint`.
      dtype: that it computed in.
      format_version: of the files.
    """

    holds: ClassVar[str]
    """What the folder holds, for messages."""

    own_field: ClassVar[str]
    """A field that the other manifests lack."""

    records: int
    shard_size: int
    tokenizer: TokenizerConfig
    fingerprint: str
    dtype: str
    format_version: int

    @property
    def shards(self) -> int:
        """Their number."""
        return -(-self.records // self.shard_size)

    def write(self, folder: Path) -> None:
        with replace_file(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(to_dict(self), indent=2) + "\n")

    @classmethod
    def read(cls: type[AnyManifest], folder: str | os.PathLike[str]) -> AnyManifest:
        """The manifest of a folder. Raises a FileError if it is missing or damaged, or of another
        kind."""
        path = Path(folder) / MANIFEST
        try:
            data = readers.read_json(path, fix="write the tokens again")
        except readers.MissingFile as error:
            raise FileError(
                f"no tokens in {os.fspath(folder)} (no {MANIFEST}); write them: bitdance tokenize",
                folder,
            ) from error
        for kind in TokensManifest.__subclasses__():
            if kind is not cls and kind.own_field in data:
                raise FileError(f"{folder} holds {kind.holds}, and not {cls.holds}", folder)
        manifest = from_dict(cls, data, str(path))
        if manifest.format_version != FORMAT_VERSION:
            raise FileError(
                f"{path} has format {manifest.format_version}, and this version reads "
                f"{FORMAT_VERSION}; write the tokens again",
                path,
            )
        return manifest

    def check_encoder(
        self, folder: str | os.PathLike[str], config: TokenizerConfig, params: Any
    ) -> None:
        """Checks that a model can train on the tokens.

        Args:
          folder: of the tokens.
          config: sizes of the model's tokenizer.
          params: its weights, in float32 or as saved.

        Raises:
          UserError: they are of another tokenizer.
        """
        tokens = f"the tokens in {os.fspath(folder)}"
        if self.tokenizer != config:
            raise UserError(
                f"{tokens} are of the tokenizer {self.tokenizer}, and the model's is {config}"
            )
        fingerprint = encoder_fingerprint(config, params)
        if self.fingerprint != fingerprint:
            raise UserError(
                f"{tokens} are of another tokenizer of the same sizes (its encoder is "
                f"{self.fingerprint}, the model's {fingerprint}); use the tokenizer that wrote "
                "them, or write them again"
            )


@dataclass(frozen=True)
class Manifest(TokensManifest):
    """The contents of a folder of tokens.

    Attributes:
      records: number of images; all shards but the last have `shard_size` of them, in the order of
        the source.
      shard_size: images per shard.
      class_names: the name of each label.
      image_size: in pixels.
      tokenizer: its sizes.
      fingerprint: of its encoder, see `encoder_fingerprint`.
      dtype: that it computed in.
      images: of the source, see `images_fingerprint`.
      versions: of each image.
      held_out: the records that the source itself holds out, if it does, see `ImageSource`.
      format_version: of the files.
    """

    holds = "tokens of labelled images"
    own_field = "class_names"

    records: Count
    shard_size: Count
    class_names: tuple[str, ...]
    image_size: Size
    tokenizer: TokenizerConfig
    fingerprint: str
    dtype: str
    images: str
    versions: Versions
    held_out: tuple[Natural, ...] = ()
    format_version: Natural = FORMAT_VERSION

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """The shape of one version's packed bits, or float16 numbers: h, w, bytes."""
        side = self.image_size // self.tokenizer.downsampling
        return side, side, self.tokenizer.packed_bytes


def shards(folder: str | os.PathLike[str], manifest: TokensManifest) -> list[Shard]:
    """All shards of a folder of tokens with a manifest, whether they exist or not."""
    tokens = hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest()[:16]

    def shard(number: int) -> Shard:
        start = number * manifest.shard_size
        name = f"tokens-{number:05d}-of-{manifest.shards:05d}.array_record"
        records = range(start, min(start + manifest.shard_size, manifest.records))
        return Shard(Path(folder) / name, tokens, number, records)

    return [shard(number) for number in range(manifest.shards)]


class TokensSource:
    """Records {"codes": uint8 [h, w, bytes] of the centre crop, "label"}, and if the manifest has
    them, "codes_flipped" of its mirror image and "codes_crops" [crops, h, w, bytes]. The loader
    chooses one version as "codes".

    Attributes:
      manifest: see Manifest.
      held_out: see ImageSource.

    Raises:
      FileError: the tokens are missing, incomplete or damaged. All of them are read when it opens.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.manifest = Manifest.read(folder)
        self.class_names = self.manifest.class_names
        self.held_out: np.ndarray | None = None
        if self.manifest.held_out:
            self.held_out = np.isin(np.arange(len(self)), self.manifest.held_out)
        self._records = ShardRecords(shards(folder, self.manifest))

    def __len__(self) -> int:
        return self.manifest.records

    def __getitem__(self, index: int) -> dict[str, Any]:
        data = self._records[index]
        versions, shape = self.manifest.versions, self.manifest.code_shape
        codes = np.frombuffer(data, np.uint8, offset=LABEL.itemsize).reshape(versions.count, *shape)
        record = {"codes": codes[0], "label": np.frombuffer(data, LABEL, 1)[0]}
        if versions.flips:
            record["codes_flipped"] = codes[1]
        if versions.crops:
            record["codes_crops"] = codes[-versions.crops :]
        return record


def serialize(label: int, codes: UInt8[np.ndarray, "versions h w bytes"]) -> bytes:
    """One record."""
    return LABEL.type(label).tobytes() + codes.tobytes()


def encoder_fingerprint(config: TokenizerConfig, params: Any) -> str:
    """16 hex digits that identify a tokenizer's encoder: a hash of its sizes and float32 weights.

    Args:
      config: its sizes.
      params: its weights, as in a model folder; only "encoder" is used.
    """
    digest = hashlib.sha256(repr(config).encode())
    pending: list[tuple[str, Any]] = [("", params["encoder"])]
    while pending:
        path, node = pending.pop()
        if isinstance(node, dict):
            pending += [(f"{path}/{name}", node[name]) for name in sorted(node)]
        else:
            digest.update(path.encode() + np.asarray(node).astype(np.float32).tobytes())
    return digest.hexdigest()[:16]


def images_fingerprint(source: ImageSource) -> str:
    """16 hex digits that identify a source: a hash of its length, classes and a few images."""
    digest = hashlib.sha256(repr((source.class_names, len(source))).encode())
    for index in np.linspace(0, len(source) - 1, PROBES).astype(int).tolist():
        try:
            digest.update(source[index]["image"].tobytes())
        except DamagedImage:
            digest.update(b"damaged")
    return digest.hexdigest()[:16]


def check_tokens(
    folder: str | os.PathLike[str], config: TokenizerConfig, params: Any, *, image_size: int
) -> Manifest:
    """The manifest of tokens, after a check that a model can train on them.

    Args:
      folder: of the tokens.
      config: sizes of the model's tokenizer.
      params: its weights, in float32 or as saved.
      image_size: of the model.

    Raises:
      UserError: the tokens are missing, or of another tokenizer or image size.
    """
    manifest = Manifest.read(folder)
    if manifest.image_size != image_size:
        raise UserError(
            f"the tokens in {os.fspath(folder)} are of images of {manifest.image_size}"
            f" pixels, the model's of {image_size}"
        )
    manifest.check_encoder(folder, config, params)
    return manifest
