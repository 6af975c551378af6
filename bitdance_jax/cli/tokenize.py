r"""`bitdance tokenize`: the tokens of a dataset, so that training need not run the encoder.

    bitdance tokenize --tokenizer MODEL_FOLDER --data.source imagenet_tar \
        --data.path ILSVRC2012_img_train.tar --image-size 256 --flips --out tokens/imagenet256

Captioned images are encoded at one or more resolutions, each in the size nearest to its own:

    bitdance tokenize --tokenizer MODEL_FOLDER --captioned.paths 'shard-{000..099}.tar' \
        --captioned.resolutions 256 512 --out tokens/captioned

After an interruption the same command resumes behind the last complete shard.
`bitdance_jax.data.tokens` describes the files.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import jax

from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.cli.processes import stop_all_on_error
from bitdance_jax.config import HostsConfig
from bitdance_jax.config.plain import BatchSize, Config, ImageSide, PathName, Range, Seed
from bitdance_jax.data import captioned
from bitdance_jax.data.captioned_config import CaptionedDataConfig
from bitdance_jax.data.captioned_token_writer import describe_captioned, tokenize_captioned
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.sources import summary
from bitdance_jax.data.token_writer import BATCH_SIZE, Dtype, describe, prepare, tokenize
from bitdance_jax.data.tokens import TokensManifest, Versions
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.consistency import check_same_config
from bitdance_jax.errors import ConfigError
from bitdance_jax.io.atomic import remove_temporary_files
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.pipelines.tokenizer import Tokenizer


@dataclass(frozen=True)
class Arguments(Config):
    """Writes the tokens of a dataset's images to files.

    Attributes:
      tokenizer: model folder of a tokenizer or of a model, or a Hugging Face id; "emoji" is the
        embedded one, of 128 pixels.
      out: folder for the tokens.
      data: the images; its augment is for the random crops, its workers are loader processes.
      captioned: if it has paths: captioned images, which are encoded instead, at its resolutions.
      size_multiple: of the sizes of captioned images, in pixels: that of the models to be trained,
        or of the one with the largest P; by default 4 tokens, that of 16x models (64x: 8 tokens).
      image_size: in pixels.
      flips: also store the mirror image of each centre crop; otherwise training cannot flip them.
      crops: number of random crops to store of each image, flipped by --data.augment.flip.
      seed: of the random crops.
      batch_size: images that each device encodes at a time.
      dtype: of the encoder's arithmetic.
      hosts: how the processes find each other, see HostsConfig; each writes shards of its own to
        the same folder.
    """

    ALIASES: ClassVar = {
        f"data.{name}": f"captioned.{name}"
        for name in ("paths", "captions", "held_out_field", "resolutions", "too_small")
    }

    tokenizer: PathName
    out: PathName
    data: DataConfig = DataConfig()
    captioned: CaptionedDataConfig = CaptionedDataConfig()
    size_multiple: ImageSide | None = None
    image_size: ImageSide = 256
    flips: bool = False
    crops: Annotated[int, Range(0, 1000)] = 0
    seed: Seed = 0
    batch_size: BatchSize = BATCH_SIZE
    dtype: Dtype = "float32"
    hosts: HostsConfig = HostsConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        Versions(self.flips, self.crops, seed=self.seed)  # checks its values
        if self.data.source == "tokens":
            raise ConfigError("data.source must be images, got tokens", "data.source")
        if self.captioned.paths and (self.flips or self.crops):
            given = "flips=True" if self.flips else f"crops={self.crops}"
            raise ConfigError(
                f"captioned images are not flipped and not cropped at random; leave out {given}"
            )


def main() -> None:
    arguments = parse(Arguments)
    multihost.initialize(arguments.hosts)
    with stop_all_on_error():
        check_same_config(arguments)
        keep_compiled()
        _tokenize(arguments)


def _tokenize(arguments: Arguments) -> None:
    start = time.perf_counter()
    encode = _captioned if arguments.captioned.paths else _labelled
    total, count = encode(arguments, Path(arguments.out))
    speed = ""
    if count:
        rate = count / (time.perf_counter() - start)
        speed = f", {rate:.1f} images/s on {jax.local_device_count()} devices"
    print(
        f"{arguments.out}: tokens of {total:,} images, "
        f"{count:,} of them written by this process now{speed}"
    )


def _labelled(arguments: Arguments, folder: Path) -> tuple[int, int]:
    """Returns the number of images, and of those that this process has encoded."""
    versions = Versions(arguments.flips, arguments.crops, arguments.data.augment, arguments.seed)
    source = arguments.data.open_split("all")
    if jax.process_index() == 0:
        print(summary(source), file=sys.stderr)
    tokenizer = Tokenizer.load(arguments.tokenizer)
    manifest = describe(
        source,
        tokenizer.config,
        tokenizer.params,
        image_size=arguments.image_size,
        versions=versions,
        dtype=arguments.dtype,
    )
    with _writing(folder, manifest):
        count = tokenize(
            source,
            tokenizer.params,
            folder=folder,
            manifest=manifest,
            batch_size=arguments.batch_size,
            workers=arguments.data.workers,
        )
    return len(source), count


def _captioned(arguments: Arguments, folder: Path) -> tuple[int, int]:
    """As `_labelled`, of captioned images."""
    data = arguments.captioned
    train, held_out = data.open_marked()
    if jax.process_index() == 0:
        for source in (*train, *held_out):
            print(captioned.summary(source), file=sys.stderr)
    tokenizer = Tokenizer.load(arguments.tokenizer)
    manifest = describe_captioned(
        train,
        held_out,
        tokenizer.config,
        tokenizer.params,
        resolutions=data.resolutions,
        size_multiple=arguments.size_multiple or 4 * tokenizer.config.downsampling,
        too_small=data.too_small,
        dtype=arguments.dtype,
    )
    with _writing(folder, manifest):
        count = tokenize_captioned(
            train,
            held_out,
            tokenizer.params,
            folder=folder,
            manifest=manifest,
            workers=data.workers,
        )
    return manifest.records, count


@contextlib.contextmanager
def _writing(folder: Path, manifest: TokensManifest) -> Iterator[None]:
    """Locks and prepares the folder."""

    def begin() -> None:
        remove_temporary_files(folder, recursive=False)
        prepare(folder, manifest)

    with multihost.entered_on_process_0(writer_lock(folder, is_folder=True)):
        multihost.on_process_0(begin)
        if jax.process_index() > 0:
            # Checks that the folder is shared and that all processes have the same images.
            prepare(folder, manifest)
        yield
