"""The folder of images that a benchmark's scorer reads, and a prompt's files in it."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

from bitdance_jax.config import SamplerConfig, to_dict
from bitdance_jax.errors import FileError, short
from bitdance_jax.io import image_files, readers
from bitdance_jax.io.atomic import remove_temporary_files, replace_file
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.pipelines.pipeline import common_description


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
      name: of its image file in the folder, without .png; for GenEval of its own folder.
      text: the prompt.
      where: its file and line, for messages.
      line: of GenEval's file, unchanged; None for other benchmarks.
    """

    name: str
    text: str
    where: str
    line: bytes | None = None

    def finished(self, folder: Path, count: int) -> bool:
        """Whether all files of `count` images exist and are undamaged."""
        names = [*self._metadata(), *self._images(count)]
        return all(self._is_complete(folder / name) for name in names)

    def write(
        self,
        folder: Path,
        images: UInt8[np.ndarray, "B H W 3"],
        texts: Sequence[dict[str, str]],
    ) -> None:
        """Writes the files that are missing or damaged, each atomically.

        Args:
          folder: of the benchmark's images.
          images: all of this prompt.
          texts: text chunks of each.
        """
        for name in self._metadata():
            if not self._is_complete(folder / name):
                with replace_file(folder / name) as temporary:
                    temporary.write_bytes(self.line or b"")
        files = zip(
            self._images(len(images)),
            [_two_columns(images), *images],
            [common_description(texts), *texts],
            strict=False,
        )
        for name, image, text in files:
            if not self._is_complete(folder / name):
                image_files.save_png(folder / name, image, text=text)

    def _is_complete(self, file: Path) -> bool:
        """Whether a file exists and is undamaged; of a PNG only the checksums are read."""
        try:
            if file.suffix != ".png":
                return file.read_bytes() == self.line
            with Image.open(file, formats=["PNG"]) as image:
                image.verify()
        except Exception:  # Pillow raises many types of exceptions for damaged files.
            return False
        return True

    def _metadata(self) -> list[str]:
        return [] if self.line is None else [f"{self.name}/metadata.jsonl"]

    def _images(self, count: int) -> list[str]:
        """The file of the grid, and for GenEval those of the images."""
        if self.line is None:
            return [f"{self.name}.png"]
        return [
            f"{self.name}/grid.png",
            *(f"{self.name}/samples/{j:04d}.png" for j in range(count)),
        ]


class ImageFolder:
    """The folder of a benchmark's images.

    It contains only the benchmark's files, because the scorers read everything in it. The settings
    are beside it, in FOLDER.settings.json, so that a later call with other settings is an error.
    """

    def __init__(self, path: str, settings: dict[str, Any], per_prompt: int) -> None:
        """`settings` are JSON-ready. Nothing is read or written before `open`."""
        self._path = Path(path)
        self._settings_file = Path(f"{os.path.abspath(path)}.settings.json")
        self._settings = settings
        self._per_prompt = per_prompt
        self._pool = ThreadPoolExecutor(thread_name_prefix="images")
        self._writing: list[Future[None]] = []

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Locks the folder until the block ends.

        Raises:
          FileError: the folder cannot be written, contains images of other settings or other files,
            or another process has locked it.
        """
        image_files.check_writable(self._path / "any.png")
        with writer_lock(self._path, is_folder=True), self._pool:
            self._check_settings()
            remove_temporary_files(self._path)
            yield

    def finished(self, prompts: list[Prompt]) -> int:
        """How many of these prompts have all their files."""
        return sum(prompt.finished(self._path, self._per_prompt) for prompt in prompts)

    def write(
        self,
        prompts: list[Prompt],
        images: UInt8[np.ndarray, "prompts B H W 3"],
        texts: Sequence[Sequence[dict[str, str]]],
    ) -> None:
        """Starts to write images in threads, once the images of the last call are written.

        Args:
          prompts: of the benchmark.
          images: of each prompt; further ones are ignored.
          texts: text chunks of each image of each prompt.
        """
        self.wait()
        if not self._settings_file.exists():
            with replace_file(self._settings_file) as temporary:
                temporary.write_text(json.dumps(self._settings, indent=2) + "\n")
        self._writing = [
            self._pool.submit(prompt.write, self._path, own_images, own_texts)
            for prompt, own_images, own_texts in zip(prompts, images, texts, strict=False)
        ]

    def wait(self) -> None:
        """Returns once all images given to `write` are written.

        Raises:
          FileError: they cannot be written.
        """
        for writing in self._writing:
            writing.result()

    def _check_settings(self) -> None:
        file = self._settings_file
        settings = self._settings
        fix = "choose another folder"
        old: dict[str, Any] = readers.read_json(file, fix=fix) if file.exists() else settings
        if not old.keys() & settings.keys():
            raise FileError(f"{file} is not of this command; {fix}", file)
        if all(child.name.startswith(".") for child in self._path.iterdir()):
            file.unlink(missing_ok=True)  # The images were removed since.
            return
        if not file.exists():
            raise FileError(
                f"{self._path} is not empty and has no {file.name} beside it; {fix}",
                self._path,
            )
        # Earlier versions recorded only the sampler settings that had flags.
        defaults = to_dict(SamplerConfig()).items()
        old |= {name: value for name, value in defaults if name in settings and name not in old}
        differ = [
            f"{name} {short(old.get(name))}, requested {short(settings.get(name))}"
            for name in old | settings
            if old.get(name) != settings.get(name)
        ]
        if differ:
            raise FileError(
                f"{self._path} was begun with other settings ({'; '.join(differ)}); "
                "use the same again, or choose another folder",
                self._path,
            )


def _two_columns(
    images: UInt8[np.ndarray, "B H W 3"],
) -> UInt8[np.ndarray, "rows_height columns_width 3"]:
    """A grid of two columns, or a single image, without padding; its last cell may be black."""
    columns = min(2, len(images))
    full = np.concatenate([images, np.zeros((-len(images) % columns, *images.shape[1:]), np.uint8)])
    return rearrange(full, "(row column) h w c -> (row h) (column w) c", column=columns)
