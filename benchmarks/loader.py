"""Measures the throughput of the data loader from each kind of source, with synthetic data.

    python benchmarks/loader.py --workers 0 2

The images are JPEGs like those of ImageNet: 500 x 375 pixels, 4:2:0, about 110 KB. They are read
from the disk's cache, so that this measures the processor.
"""

import contextlib
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import AugmentConfig, TokenizerConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.data.loader import make_loader
from bitdance_jax.data.token_writer import write_shard
from bitdance_jax.data.tokens import Manifest, Versions, serialize, shards
from bitdance_jax.errors import ConfigError, UserError


CLASSES = ("n01440764", "n01443537")
TOKENS = 40_000
SOURCES = ("folder", "imagenet_tar", "tfds", "tokens")


@dataclass(frozen=True)
class Arguments:
    """Loader benchmark.

    Attributes:
      sources: kinds of sources: folder, imagenet_tar, tfds, tokens.
      workers: numbers of loader processes to try; 0 loads in threads.
      image_size: in pixels.
      batch_size: images in a batch; for tokens 8 times as many.
      images: number of synthetic JPEGs.
      seconds: length of a measurement.
      repeats: number of measurements, after a warm-up; their median is printed.
    """

    sources: tuple[str, ...] = SOURCES
    workers: tuple[int, ...] = (0, 2)
    image_size: int = 256
    batch_size: int = 64
    images: int = 600
    seconds: float = 5.0
    repeats: int = 3

    def __post_init__(self) -> None:
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown:
            known = ", ".join(SOURCES)
            raise ConfigError(f"sources has {unknown[0]}; known: {known}", "sources")
        for field in ("image_size", "batch_size", "images", "seconds", "repeats"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"{field} must be positive", field)


def jpeg(number: int) -> bytes:
    """An image with detail at three scales."""
    rng = np.random.default_rng(number)
    width, height = (500, 375) if number % 3 else (375, 500)

    def noise(scale: int) -> np.ndarray:
        small = rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3), np.uint8)
        return np.asarray(
            Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        ).astype(np.float32)

    pixels = 0.3 * noise(60) + 0.2 * noise(10) + 0.5 * noise(2)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()


def write_folder(path: Path, images: list[bytes]) -> None:
    for number, image in enumerate(images):
        file = path / CLASSES[number % len(CLASSES)] / f"{number}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)


def write_tar(path: Path, images: list[bytes]) -> None:
    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(path, "w") as outer:
        for label, wnid in enumerate(CLASSES):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for number, image in enumerate(images[label :: len(CLASSES)]):
                    add(inner, f"{wnid}_{number}.JPEG", image)
            add(outer, f"{wnid}.tar", file.getvalue())


def write_tfds(folder: Path, images: list[bytes]) -> None:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            "the source tfds needs another package: pip install 'bitdance_jax[datasets]'"
        ) from error

    class Synthetic(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        # TFDS would search for them with a package that it does not require.
        url_infos: dict[str, str] = {}  # noqa: RUF012

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=CLASSES),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, download_manager: object) -> dict[str, Iterator]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator:
            for number, image in enumerate(images):
                yield number, {"image": io.BytesIO(image), "label": number % len(CLASSES)}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        Synthetic(data_dir=folder).download_and_prepare(file_format="array_record")


def write_tokens(folder: Path, image_size: int) -> None:
    """Writes random bits of a tokenizer with 32 bits a token and tokens of 16 x 16 pixels."""
    versions = Versions(flips=True)
    manifest = Manifest(
        TOKENS,
        TOKENS,
        CLASSES,
        image_size,
        TokenizerConfig(),
        "synthetic",
        "float32",
        "synthetic",
        versions,
    )
    manifest.write(folder)
    (shard,) = shards(folder, manifest)
    rng = np.random.default_rng(0)
    with write_shard(shard) as write:
        for number in range(TOKENS):
            codes = rng.integers(0, 256, (versions.count, *manifest.code_shape), np.uint8)
            write(serialize(number % 2, codes))


def make_data(folder: Path, source: str, arguments: Arguments) -> DataConfig:
    path = folder / source
    if source == "tokens":
        write_tokens(path, arguments.image_size)
        return DataConfig(source="tokens", path=str(path))
    numbers = tqdm(range(arguments.images), desc=f"making {source}", unit="image", leave=False)
    images = [jpeg(number) for number in numbers]
    if source == "folder":
        write_folder(path, images)
        return DataConfig(source="folder", path=str(path))
    if source == "imagenet_tar":
        write_tar(path, images)
        return DataConfig(source="imagenet_tar", path=str(path))
    write_tfds(path, images)
    return DataConfig(source="tfds", dataset="synthetic", path=str(path))


def measure(config: DataConfig, workers: int, arguments: Arguments) -> tuple[float, float]:
    """Median images a second, and median milliseconds of this process's CPU time an image."""
    batch_size = arguments.batch_size * (8 if config.source == "tokens" else 1)
    batches = make_loader(
        config.open_split("all"),
        batch_size=batch_size,
        seed=0,
        image_size=arguments.image_size,
        augment=AugmentConfig(),
        workers=workers,
    )

    def time_part() -> tuple[float, float]:
        count = 0
        start = time.perf_counter()
        cpu_start = time.process_time()
        while time.perf_counter() - start < arguments.seconds:
            count += len(next(batches)["label"])
        seconds = time.perf_counter() - start
        cpu_seconds = time.process_time() - cpu_start
        return count / seconds, 1e3 * cpu_seconds / count

    time_part()  # Workers start, and prefetched batches are used.
    rates, costs = zip(*(time_part() for _ in range(arguments.repeats)), strict=True)
    batches.close()
    return statistics.median(rates), statistics.median(costs)


def main() -> None:
    arguments = parse(Arguments)
    print(f"{arguments.image_size} px, random crops and flips, batches of {arguments.batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        for source in arguments.sources:
            config = make_data(Path(folder), source, arguments)
            for workers in arguments.workers:
                rate, cost = measure(config, workers, arguments)
                print(
                    f"{source:<13} {workers} workers  {rate:>8.0f} images/s"
                    f"  {cost:>6.2f} ms of this process an image",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(run(main))
