"""A dataset of your own: images in one NumPy archive.

    python examples/dataset.py                                    # a toy archive, a few steps
    bitdance train examples/dataset.py --data.path digits.npz --image-size 64 --run.steps 5000

A source is a sequence of records; a subclass of DataConfig opens it. Shuffling, crops, flips, the
held-out part, worker processes and resuming need nothing more.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitdance_jax.config import OptimizerConfig, RunConfig, TokenizerConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.errors import FileError
from bitdance_jax.train import TokenizerTraining, train


class ArchiveSource:
    """The arrays `images` (uint8 [N, H, W] or [N, H, W, 3]), `labels` (integers [N]) and `classes`
    (strings) of an .npz file."""

    def __init__(self, path: str) -> None:
        try:
            with np.load(path) as file:
                self._images = file["images"]
                self._labels = file["labels"]
                self.class_names = tuple(map(str, file["classes"]))
        except (OSError, KeyError, ValueError) as error:
            raise FileError(f"cannot read the archive {path}: {error}", path) from error

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._images[index]
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=-1)
        return {"image": image, "label": np.int32(self._labels[index])}


@dataclass(frozen=True)
class ArchiveData(DataConfig):
    """`path` is the archive."""

    def open(self) -> ArchiveSource:
        return ArchiveSource(self.path or "")


def get_config() -> TokenizerTraining:
    """A tokenizer for the archive's images; `bitdance train` calls this."""
    return TokenizerTraining(
        run=RunConfig(workdir="runs/archive", steps=4, log_every=2),
        model=TokenizerConfig(bits=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=1),
        image_size=16,
        data=ArchiveData(path="archive.npz", batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
    )


def write_toy_archive(path: Path) -> None:
    """64 images of 20 x 20 pixels in two classes: dark and bright noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    images = rng.integers(0, 128, (64, 20, 20)) + 127 * labels[:, None, None]
    np.savez(path, images=images.astype(np.uint8), labels=labels, classes=["dark", "bright"])


def main() -> None:
    config = get_config()
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "archive.npz"
        write_toy_archive(archive)
        config = dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, workdir=f"{folder}/run"),
            data=dataclasses.replace(config.data, path=str(archive)),
        )
        train(config.make_task(), config)


if __name__ == "__main__":
    main()
