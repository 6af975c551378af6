"""Prompt files of GenEval and DPG-Bench, and the folder of images that their scorers read.

The layouts are those of the scorers in github.com/djghosh13/geneval and github.com/TencentQQGYLab/ELLA (dpg_bench).
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

from bitdance_jax.config import SamplerConfig, to_dict
from bitdance_jax.errors import FileError, UserError, short
from bitdance_jax.io import image_files, readers
from bitdance_jax.io.atomic import remove_temporary_files, replace_file
from bitdance_jax.io.locks import writer_lock


GENEVAL_PROMPTS = 553


@dataclass(frozen=True)
class Prompt:
    """A benchmark's prompt.

    Attributes:
      name: of its file or folder.
      text: the prompt.
      where: in which file and line, for messages.
      line: of GenEval, as it was.
    """

    name: str
    text: str
    where: str
    line: bytes | None = None

    def finished(self, folder: Path, count: int) -> bool:
        """Whether all files of `count` images are there, undamaged."""
        return all(
            self._is_whole(folder / name) for name in [*self._metadata(), *self._images(count)]
        )

    def write(self, folder: Path, images: UInt8[np.ndarray, "N H W 3"]) -> None:
        """Writes the files that are not there yet or damaged, each whole or not at all."""
        for name in self._metadata():
            if not self._is_whole(folder / name):
                with replace_file(folder / name) as temporary:
                    temporary.write_bytes(self.line or b"")
        for name, image in zip(
            self._images(len(images)), [_two_columns(images), *images], strict=False
        ):
            if not self._is_whole(folder / name):
                image_files.save_png(folder / name, image)

    def _is_whole(self, file: Path) -> bool:
        """Whether a file is there as it was written: a PNG by its own checksums, without decoding it."""
        try:
            if file.suffix != ".png":
                return file.read_bytes() == self.line
            with Image.open(file, formats=["PNG"]) as image:
                image.verify()
        except Exception:  # Pillow raises many types for damaged files.
            return False
        return True

    def _metadata(self) -> list[str]:
        return [] if self.line is None else [f"{self.name}/metadata.jsonl"]

    def _images(self, count: int) -> list[str]:
        """The grid, then, for GenEval, each image."""
        if self.line is None:
            return [f"{self.name}.png"]
        return [
            f"{self.name}/grid.png",
            *(f"{self.name}/samples/{j:04d}.png" for j in range(count)),
        ]


@dataclass(frozen=True)
class GenevalLine:
    """What is read of a line; the scorer reads the rest."""

    prompt: str


class ImageFolder:
    """The folder of a benchmark's images. Every file in it is one of the benchmark's: its scorers take what they find.

    What decides the images stands beside it in FOLDER.settings.json, so that a start with other settings is refused.
    """

    def __init__(self, path: str, settings: dict[str, Any], per_prompt: int) -> None:
        """`settings` are JSON-ready. Touches nothing: `open` does."""
        self._path, self._settings_file = Path(path), Path(f"{os.path.abspath(path)}.settings.json")
        self._settings, self._per_prompt = settings, per_prompt
        self._pool, self._writing = (
            ThreadPoolExecutor(thread_name_prefix="images"),
            list[Future[None]](),
        )

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Keeps the folder to this process until the block ends.

        Raises:
          UserError: it cannot be written, holds images of other settings or something else, or another process is writing there.
        """
        image_files.check_writable(self._path / "any.png")
        with writer_lock(self._path, is_folder=True), self._pool:
            self._check_settings()
            remove_temporary_files(self._path)
            yield

    def finished(self, prompts: list[Prompt]) -> int:
        """How many of these have all their files."""
        return sum(prompt.finished(self._path, self._per_prompt) for prompt in prompts)

    def write(self, prompts: list[Prompt], images: UInt8[np.ndarray, "Q N H W 3"]) -> None:
        """Writes images while others are drawn, once those before them are written: compressing a batch takes seconds."""
        self.wait()
        if not self._settings_file.exists():
            with replace_file(self._settings_file) as temporary:
                temporary.write_text(json.dumps(self._settings, indent=2) + "\n")
        pairs = zip(prompts, images, strict=False)
        self._writing = [self._pool.submit(prompt.write, self._path, own) for prompt, own in pairs]

    def wait(self) -> None:
        """Returns once all that `write` got is in its place.

        Raises:
          UserError: it cannot be written.
        """
        for writing in self._writing:
            writing.result()

    def _check_settings(self) -> None:
        file, settings = self._settings_file, self._settings
        mend = "choose another folder"
        there: dict[str, Any] = readers.read_json(file, fix=mend) if file.exists() else settings
        if not there.keys() & settings.keys():
            raise FileError(f"{file} is not of this command; {mend}", file)
        if all(child.name.startswith(".") for child in self._path.iterdir()):
            file.unlink(missing_ok=True)  # Of images that were since removed.
            return
        if not file.exists():
            raise FileError(
                f"{self._path} is not empty and has no {file.name} beside it; choose another folder",
                self._path,
            )
        # Earlier versions did not write down what they did not let choose.
        defaults = to_dict(SamplerConfig()).items()
        there |= {name: value for name, value in defaults if name in settings and name not in there}
        names = list(there | settings)
        differ = [
            f"{name} {short(there.get(name))}, asked for {short(settings.get(name))}"
            for name in names
            if there.get(name) != settings.get(name)
        ]
        if differ:
            raise FileError(
                f"{self._path} was begun with other settings ({'; '.join(differ)}); "
                "use the same again, or choose another folder",
                self._path,
            )


def read_geneval(path: str) -> list[Prompt]:
    """The prompts of a .jsonl with a "prompt" in each line, named 00000, 00001, ...; empty lines are left out.

    Raises:
      UserError: no such file, none in it, or a line that is no such object.
    """
    prompts: list[Prompt] = []
    # Without a byte order mark, which the scorer does not know.
    lines = readers.read_text(path, readers.MAX_LIST_BYTES).encode()
    for number, line in enumerate(lines.splitlines(keepends=True), 1):
        where = f"line {number} of {path}"
        if not line.strip():
            continue
        mend = 'a line is an object with a "prompt" that is text'
        entry: GenevalLine = readers.decode_json(line, GenevalLine, where=where, fix=mend)
        prompts.append(Prompt(f"{len(prompts):05d}", entry.prompt, where, line))
    if not prompts:
        raise UserError(f"{path} has no prompts")
    return prompts


def geneval_figure(prompts: list[Prompt]) -> str:
    """Which published figure the images of these prompts are for."""
    figures = "the published 0.86 (14B-16x) and 0.85 (14B-64x)"
    rewritten = f"the {GENEVAL_PROMPTS} rewritten prompts, evaluation_metadata_long.jsonl"
    if all(prompt.text.startswith("a photo of ") for prompt in prompts):
        return f"these are GenEval's own short prompts; {figures} are for {rewritten}"
    if len(prompts) == GENEVAL_PROMPTS:
        return f"{GENEVAL_PROMPTS} rewritten prompts; {figures} are for such"
    return f"{figures} are for {rewritten}, and these are {len(prompts)} others"


def read_dpg(path: str) -> list[Prompt]:
    """The prompts of a folder of ID.txt, in the order of their names, or of a .json of {id: prompt}, in its own.

    Raises:
      UserError: no such file or folder, no prompts in it, another content, or ids that are there twice or cannot name files.
    """
    if Path(path).is_dir():
        files = sorted(Path(path).glob("*.txt"))
        prompts = [Prompt(file.stem, readers.read_text(file).strip(), str(file)) for file in files]
    else:
        data = readers.read_bytes(path, readers.MAX_LIST_BYTES)
        mend = "DPG-Bench's prompts are {id: prompt}, each id once, or a folder of ID.txt"
        texts: dict[str, str] = readers.decode_json(
            data, dict[str, str], where=path, fix=mend, unique=True
        )
        prompts = [Prompt(name, text, f"{name!r} of {path}") for name, text in texts.items()]
    if not prompts:
        raise UserError(f"{path} has no prompts")
    for name in (prompt.name for prompt in prompts):
        if not re.fullmatch(
            r"[\w-]{1,200}", name, re.ASCII
        ):  # The scorer takes what comes before the first dot.
            raise UserError(
                f"{path}: the id {short(name)} cannot name an image; ids are letters, digits, _ and -"
            )
    return prompts


def _two_columns(
    images: UInt8[np.ndarray, "N H W 3"],
) -> UInt8[np.ndarray, "rows_height columns_width 3"]:
    """Two in a row without padding, one as it is; black at the end of a last row that is not full."""
    columns = min(2, len(images))
    full = np.concatenate([images, np.zeros((-len(images) % columns, *images.shape[1:]), np.uint8)])
    return rearrange(full, "(row column) h w c -> (row h) (column w) c", column=columns)
