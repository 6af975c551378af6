r"""`bitdance tokenize`: the tokens of a dataset, so that training need not run the encoder.

    bitdance tokenize --tokenizer MODEL_FOLDER --data.source imagenet_tar \
        --data.path ILSVRC2012_img_train.tar --image-size 256 --flips --out tokens/imagenet256

After an interruption the same command resumes behind the last complete shard.
`bitdance_jax.data.tokens` describes the files.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax

from bitdance_jax.cli.flags import parse
from bitdance_jax.cli.processes import stop_all_on_error
from bitdance_jax.config import HostsConfig
from bitdance_jax.config.plain import BatchSize, Config, ImageSide, PathName, Range, Seed
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.sources import summary
from bitdance_jax.data.token_writer import BATCH_SIZE, Dtype, describe, prepare, tokenize
from bitdance_jax.data.tokens import Versions
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
        embedded one.
      out: folder for the tokens.
      data: the images; its augment is for the random crops, its workers are loader processes.
      image_size: in pixels.
      flips: also store the mirror image of each centre crop; otherwise training cannot flip them.
      crops: number of random crops to store of each image, flipped by --data.augment.flip.
      seed: of the random crops.
      batch_size: images that each device encodes at a time.
      dtype: of the encoder's arithmetic.
      hosts: how the processes find each other, see HostsConfig; each writes shards of its own to
        the same folder.
    """

    tokenizer: PathName
    out: PathName
    data: DataConfig = DataConfig()
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


def main() -> None:
    arguments = parse(Arguments)
    multihost.initialize(arguments.hosts)
    with stop_all_on_error():
        check_same_config(arguments)
        _tokenize(arguments)


def _tokenize(arguments: Arguments) -> None:
    versions = Versions(arguments.flips, arguments.crops, arguments.data.augment, arguments.seed)
    source = arguments.data.open_split("all")
    if jax.process_index() == 0:
        print(summary(source), file=sys.stderr)
    tokenizer = Tokenizer.load(arguments.tokenizer)
    folder = Path(arguments.out)
    manifest = describe(
        source,
        tokenizer.config,
        tokenizer.params,
        image_size=arguments.image_size,
        versions=versions,
        dtype=arguments.dtype,
    )
    start = time.perf_counter()

    def begin() -> None:
        remove_temporary_files(folder, recursive=False)
        prepare(folder, manifest)

    with multihost.entered_on_process_0(writer_lock(folder, is_folder=True)):
        multihost.on_process_0(begin)
        if jax.process_index() > 0:
            # Checks that the folder is shared and that all processes have the same images.
            prepare(folder, manifest)
        count = tokenize(
            source,
            tokenizer.params,
            folder=folder,
            manifest=manifest,
            batch_size=arguments.batch_size,
            workers=arguments.data.workers,
        )
    speed = ""
    if count:
        rate = count / (time.perf_counter() - start)
        speed = f", {rate:.1f} images/s on {jax.local_device_count()} devices"
    print(
        f"{folder}: tokens of {len(source):,} images, "
        f"{count:,} of them written by this process now{speed}"
    )
