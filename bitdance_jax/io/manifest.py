"""The `config.json` of a model folder: its description, and the sizes and checksums of its files.

It is `{"format": "bitdance_jax", "version": 1, "package_version": ..., "kind": ...,
"config": {...}, "metadata": {...}, "files": {name: [bytes, CRC-32]}}`. Nothing reads the version of
the package that wrote it; it is for users.
"""

import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from etils import epath

from bitdance_jax.errors import FileError, short
from bitdance_jax.io import model_folder_hints, paths, readers
from bitdance_jax.version import __version__


FILE = "config.json"
FORMAT = "bitdance_jax"
VERSION = 1

REFETCH = "fetch or write the folder again"

UNFINISHED = 0
"""The version of a folder under gs:// that is still being written."""

Kind = Literal["tokenizer", "class_conditional", "text_to_image", "language_model"]

IN_WORDS: dict[Kind, str] = {
    "tokenizer": "tokenizer",
    "class_conditional": "class-conditional model",
    "text_to_image": "text-to-image model",
    "language_model": "language model",
}


def require_kind(folder: str | os.PathLike[str], kind: Kind, needed: Kind) -> None:
    """Raises a FileError if the model in a folder is of another kind than is needed."""
    if kind != needed:
        there, here = IN_WORDS[kind], IN_WORDS[needed]
        raise FileError(f"{folder} holds a {there}, and a {here} is needed here", folder)


@dataclass(frozen=True)
class Manifest:
    """The content of config.json.

    Attributes:
      kind: of the model.
      config: of the model, as plain data.
      metadata: whatever the writer recorded.
      files: size and CRC-32 of each file, by its path in the folder.
    """

    kind: Kind
    config: dict[str, Any]
    metadata: dict[str, Any]
    files: dict[str, tuple[int, int]]


def write(folder: epath.Path, manifest: Manifest, version: int = VERSION) -> None:
    """Writes config.json."""
    header = {"format": FORMAT, "version": version, "package_version": __version__}
    content = header | vars(manifest)
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")


def read(folder: epath.Path) -> Manifest:
    """Reads config.json.

    Raises:
      FileError: the folder is missing, not a model folder, unfinished, or of a newer version.
    """
    paths.check_path(folder)
    if not folder.exists():
        raise _not_a_model(folder, f"no model folder {folder}")
    if not folder.is_dir():
        raise _not_a_model(folder, f"{folder} is not a model folder but a file")
    file = folder / FILE
    try:
        content = readers.read_json(file, Any)
    except readers.MissingFile as error:
        reason = f"{folder} is not a model folder: it has no {FILE}"
        raise _not_a_model(folder, reason) from error
    fields = {"format", "version", "kind", "config", "metadata"}
    if not isinstance(content, dict) or not fields <= content.keys() or content["format"] != FORMAT:
        reason = f"{folder} is not a model folder: its {FILE} is not one of {FORMAT}"
        raise _not_a_model(folder, reason)
    if not isinstance(content["config"], dict) or not isinstance(content["metadata"], dict):
        raise FileError(f"{file} is damaged: config and metadata must be objects", file)
    if content["version"] == UNFINISHED:
        raise FileError(
            f"{folder} is incomplete: writing it was interrupted; write it again", folder
        )
    if content["version"] != VERSION:
        raise FileError(
            f"{folder} has format version {short(content['version'])}, and this bitdance_jax reads"
            f" version {VERSION}; update it"
        )
    kind = readers.validate(content["kind"], Kind, where=f"kind of {file}")
    entries = content.get("files", {})
    files = readers.validate(entries, dict[str, tuple[int, int]], where=f"files of {file}")
    return Manifest(kind, content["config"], content["metadata"], files)


def read_ours(folder: epath.Path) -> dict[str, Any] | None:
    """The raw content of config.json if it is of this format, even if damaged in other respects."""
    try:
        content = readers.read_json(folder / FILE, Any)
    except FileError:
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def describe(folder: epath.Path, files: Sequence[epath.Path]) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of each file, by its path in the folder."""
    return {
        file.relative_to(folder).as_posix(): (file.stat().length, checksum)
        for file, checksum in zip(files, _checksums(files), strict=True)
    }


def check_files(folder: epath.Path, entries: dict[str, tuple[int, int]]) -> None:
    """Compares the files of a folder with its manifest.

    On a local disk this reads every byte, because TensorStore would not notice an altered weight;
    under gs:// it compares the sizes alone.

    Raises:
      FileError: a file is missing, truncated or altered, or is not a regular file in the folder.
    """
    if outside := [name for name in entries if {"/", ".."} & set(PurePosixPath(name).parts)]:
        raise FileError(f"{folder / FILE} names {outside[0]}, which is outside of the folder")
    files = {folder / name: entry for name, entry in entries.items()}
    for file, (size, _) in files.items():
        if not file.exists():
            raise FileError(f"the model folder is incomplete: {file} is missing; {REFETCH}", file)
        if file.stat().length != size:
            raise _damaged(file)
    if paths.is_remote(folder):
        return
    for file in {*files, *list_files(folder / "weights")}:
        readers.check_file(file)
    for (file, (_, expected)), found in zip(files.items(), _checksums(list(files)), strict=True):
        if found != expected:
            raise _damaged(file)


def list_files(folder: epath.Path) -> list[epath.Path]:
    """All files below a folder, sorted."""
    children = sorted(folder.iterdir())
    return [
        file for child in children for file in (list_files(child) if child.is_dir() else [child])
    ]


def _not_a_model(folder: epath.Path, reason: str) -> FileError:
    hint = model_folder_hints.hint(folder)
    return FileError(f"{reason}; {hint}" if hint else reason, folder)


def _damaged(file: epath.Path) -> FileError:
    return FileError(
        f"the model folder is damaged: {file} is not as it was written; {REFETCH}",
        file,
    )


def _checksums(files: Sequence[epath.Path]) -> list[int]:
    with ThreadPoolExecutor() as pool:  # zlib releases Python's global lock
        return list(pool.map(_crc32, files))


def _crc32(file: epath.Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum
