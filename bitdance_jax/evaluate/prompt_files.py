"""Prompt files of GenEval and DPG-Bench, and the folder of images that their scorers read.

The scorers: github.com/djghosh13/geneval, and dpg_bench of github.com/TencentQQGYLab/ELLA.
"""

import contextlib
import json
import os
import re
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
from bitdance_jax.io.paths import local
from bitdance_jax.pipelines.pipeline import common_description


GENEVAL_PROMPTS = 553


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
      name: of its image file, or of its folder for GenEval.
      text: the prompt.
      where: its file and line, for messages.
      line: of GenEval's file, unchanged; None for DPG-Bench.
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


@dataclass(frozen=True)
class GenevalLine:
    """The part of a line that is read here; the scorer reads the rest."""

    prompt: str


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


def read_geneval(path: str) -> list[Prompt]:
    """The prompts of a .jsonl with a "prompt" in each line, named 00000, 00001, ...

    Empty lines are ignored.

    Raises:
      FileError: no such file, no prompts in it, or a line without a "prompt".
    """
    prompts: list[Prompt] = []
    # Removes a byte order mark, which the scorer could not read.
    lines = readers.read_text(path, readers.MAX_LIST_BYTES).encode()
    for number, line in enumerate(lines.splitlines(keepends=True), 1):
        where = f"line {number} of {path}"
        if not line.strip():
            continue
        fix = 'a line must be an object with a text "prompt"'
        entry: GenevalLine = readers.decode_json(line, GenevalLine, where=where, fix=fix)
        prompts.append(Prompt(f"{len(prompts):05d}", entry.prompt, where, line))
    if not prompts:
        raise FileError(f"{path} has no prompts", path)
    return prompts


def compare_with_published(prompts: list[Prompt]) -> str:
    """Whether the scores of these prompts can be compared with the published ones."""
    published = "the published scores, 0.86 (14B-16x) and 0.85 (14B-64x),"
    rewritten = f"the {GENEVAL_PROMPTS} rewritten prompts, evaluation_metadata_long.jsonl"
    if all(prompt.text.startswith("a photo of ") for prompt in prompts):
        return f"these are GenEval's original prompts; {published} are for {rewritten}"
    if len(prompts) == GENEVAL_PROMPTS:
        return f"{GENEVAL_PROMPTS} rewritten prompts; {published} are for such prompts"
    return f"{published} are for {rewritten}, and these are {len(prompts)} other prompts"


def read_dpg(path: str) -> list[Prompt]:
    """The prompts of a folder of ID.txt, sorted by name, or of a .json of {id: prompt}.

    Raises:
      FileError: no such file or folder, no prompts or other contents in it, or ids that occur twice
        or cannot be names of files.
    """
    if local(path).is_dir():
        files = sorted(local(path).glob("*.txt"))
        prompts = [Prompt(file.stem, readers.read_text(file).strip(), str(file)) for file in files]
    else:
        data = readers.read_bytes(path, readers.MAX_LIST_BYTES)
        fix = "give DPG-Bench's prompts as {id: prompt}, each id once, or as a folder of ID.txt"
        texts: dict[str, str] = readers.decode_json(
            data, dict[str, str], where=path, fix=fix, unique=True
        )
        prompts = [Prompt(name, text, f"{name!r} of {path}") for name, text in texts.items()]
    if not prompts:
        raise FileError(f"{path} has no prompts", path)
    for name in (prompt.name for prompt in prompts):
        # The scorer reads the id up to the first dot.
        if not re.fullmatch(r"[\w-]{1,200}", name, re.ASCII):
            raise FileError(
                f"{path}: the id {short(name)} cannot be the name of an image; "
                "use letters, digits, _ and -",
                path,
            )
    return prompts


def _two_columns(
    images: UInt8[np.ndarray, "B H W 3"],
) -> UInt8[np.ndarray, "rows_height columns_width 3"]:
    """A grid of two columns, or a single image, without padding; its last cell may be black."""
    columns = min(2, len(images))
    full = np.concatenate([images, np.zeros((-len(images) % columns, *images.shape[1:]), np.uint8)])
    return rearrange(full, "(row column) h w c -> (row h) (column w) c", column=columns)
