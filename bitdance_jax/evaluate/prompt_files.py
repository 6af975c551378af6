"""Prompt files of GenEval and DPG-Bench, and the files that their scorers read.

The layouts are those of the scorers in github.com/djghosh13/geneval and github.com/TencentQQGYLab/ELLA (dpg_bench).
"""

import collections
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import UInt8

from bitdance_jax import images
from bitdance_jax.errors import UserError
from bitdance_jax.files import replacing


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
        """Whether all files of `count` pictures are there."""
        return all((folder / name).exists() for name in [*self._metadata(), *self._pictures(count)])

    def write(self, folder: Path, pictures: UInt8[np.ndarray, "N H W 3"]) -> None:
        """Writes the files that are not there yet, each whole or not at all."""
        for name in self._metadata():
            if not (folder / name).exists():
                with replacing(folder / name) as temporary:
                    temporary.write_bytes(self.line or b"")
        for name, picture in zip(self._pictures(len(pictures)), [_two_columns(pictures), *pictures], strict=False):
            if not (folder / name).exists():
                images.save_png(folder / name, picture)

    def _metadata(self) -> list[str]:
        return [] if self.line is None else [f"{self.name}/metadata.jsonl"]

    def _pictures(self, count: int) -> list[str]:
        """The grid, then, for GenEval, each picture."""
        if self.line is None:
            return [f"{self.name}.png"]
        return [f"{self.name}/grid.png", *(f"{self.name}/samples/{j:04d}.png" for j in range(count))]


def read_geneval(path: str) -> list[Prompt]:
    """The prompts of a .jsonl with a "prompt" in each line, named 00000, 00001, ...; empty lines are left out.

    Raises:
      UserError: no such file, none in it, or a line that is no such object.
    """
    prompts: list[Prompt] = []
    for number, line in enumerate(_read(Path(path)).splitlines(keepends=True), 1):
        where = f"line {number} of {path}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}); GenEval's file has an object in each line") from error
        text = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{where} is not an object with a "prompt" that is text')
        prompts.append(Prompt(f"{len(prompts):05d}", text, where, line))
    if not prompts:
        raise UserError(f"{path} has no prompts")
    return prompts


def read_dpg(path: str) -> list[Prompt]:
    """The prompts of a folder of ID.txt, in the order of their names, or of a .json of {id: prompt}, in its own.

    Raises:
      UserError: no such file or folder, no prompts in it, another content, or ids that are there twice or cannot name files.
    """
    if Path(path).is_dir():
        prompts = [Prompt(file.stem, _text(file), str(file)) for file in sorted(Path(path).glob("*.txt"))]
    else:
        prompts = [Prompt(name, text, f"{name!r} of {path}") for name, text in _read_ids(path)]
    if not prompts:
        raise UserError(f"{path} has no prompts")
    for name in (prompt.name for prompt in prompts):
        if not re.fullmatch(r"[\w-]{1,200}", name, re.ASCII):  # The scorer takes what comes before the first dot.
            raise UserError(f"{path}: the id {name!r} cannot name a picture; ids are letters, digits, _ and -")
    return prompts


def _read_ids(path: str) -> list[tuple[str, str]]:
    try:
        # Pairs, for a dict would drop an id that is there twice. No object of the benchmark holds another.
        pairs = json.loads(_read(Path(path)), object_pairs_hook=list)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); DPG-Bench's prompts are {{id: prompt}}, or a folder of ID.txt") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise UserError(f"{path} is not an object of {{id: prompt}}")
    for name, text in pairs:
        if not isinstance(text, str):
            raise UserError(f"{path}: the prompt of {name!r} is not text")
    for name, times in collections.Counter(name for name, _ in pairs).items():
        if times > 1:
            raise UserError(f"{path} has the id {name!r} {times} times; give each prompt its own")
    return pairs


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the prompts in {path}: {error.strerror or error}") from error


def _text(path: Path) -> str:
    try:
        return _read(path).decode().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error


def _two_columns(pictures: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "rows_height columns_width 3"]:
    """Two in a row without padding, one as it is; black at the end of a last row that is not full."""
    columns = min(2, len(pictures))
    full = np.concatenate([pictures, np.zeros((-len(pictures) % columns, *pictures.shape[1:]), np.uint8)])
    return rearrange(full, "(row column) h w c -> (row h) (column w) c", column=columns)
