"""A model folder: `config.json` and the Orbax checkpoint `weights/`, on a local disk or under gs://.

The embedded model, a converted official one and a finished training run are all this. config.json is
`{"format": "bitdance_jax", "version": 1, "kind": ..., "config": {...}, "metadata": {...}, "files": {name: [bytes, CRC-32]}}`.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

import jax
from etils import epath
from flax import traverse_util

from bitdance_jax.errors import UserError, short
from bitdance_jax.io import inputs, lazy, stored_weights, unconverted, whole_folder
from bitdance_jax.io.files import check_name, check_text, write_errors
from bitdance_jax.io.stored_weights import StoredArray


Kind = Literal["tokenizer", "class_conditional", "text_to_image"]
Params = dict[str, Any]


UNFINISHED = 0
"""The version in the config.json of a folder under gs:// that is still being written."""

Place = Callable[[tuple[str, ...], StoredArray], Any]


@dataclass(frozen=True)
class ModelFolder:
    """A model read from disk.

    Attributes:
      kind: what the folder holds.
      config: the model's config as plain data (`bitdance_jax.config.from_dict` makes it one).
      metadata: whatever the writer noted: steps, data, figures.
      params: nested dict of numpy arrays, in the dtypes they were saved in (or what `load` was told to make of them).
    """

    kind: Kind
    config: dict[str, Any]
    metadata: dict[str, Any]
    params: Params


def save(
    folder: str | os.PathLike[str],
    *,
    kind: Kind,
    config: dict[str, Any],
    params: Params,
    metadata: dict[str, Any],
    files: Mapping[str, bytes] = MappingProxyType({}),
    force: bool = False,
) -> None:
    """Writes a model folder.

    A local one is written beside its place and takes it once it is whole; a symbolic link stays one.
    Under gs://, where nothing can be renamed, config.json says until the end that it is not finished.

    Args:
      folder: local or gs://.
      kind, config, metadata: see ModelFolder.
      params: nested dict of arrays, `lazy.LazyArray` ones too.
      files: further files, by their path in the folder.
      force: replace the model that is there; see `check_place`.

    Raises:
      UserError: something is there that is not to be replaced, or it cannot be written. What was there
        is there still, unless it was under gs://.
    """
    check_place(folder, force=force)
    header = {
        "format": "bitdance_jax",
        "version": 1,
        "kind": kind,
        "config": config,
        "metadata": metadata,
    }
    params = jax.tree.map(lazy.as_lazy, params)
    if _is_remote(target := epath.Path(folder)):
        with write_errors(str(target)):
            target.mkdir(parents=True, exist_ok=True)
            (target / "config.json").write_text(json.dumps(header | {"version": UNFINISHED}))
            _write(target, params, header, files)
        return
    needed = sum(array.nbytes for array in jax.tree.leaves(params))
    with whole_folder.writing(folder, needed) as new:
        _write(epath.Path(new), params, header, files)
        check_place(folder, force=force)  # writing may have taken hours


def check_place(folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """Looks whether `save` may write there: in an empty place, and with `force` over a model folder.

    Raises:
      UserError: no. Something else is there, or a model, or files in its folder that are not its own; or
        Orbax cannot write to such a name.
    """
    check_name(folder)
    path = _recovered(folder)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    header = _own_header(path)
    if header is None:
        raise UserError(f"{folder} is there and is not a model folder; give another place")
    if header.get("version") != UNFINISHED and not force:
        raise UserError(
            f"{folder} holds a model already; give another place, or --force (force=True)"
        )
    if not _is_remote(path) and (foreign := _foreign_file(path, header)):
        raise UserError(f"{folder} holds {foreign}, which is not of its model; move it elsewhere")


def read_config(folder: str | os.PathLike[str], expect: Kind | None = None) -> ModelFolder:
    """What `load` gives, but for the params, which are neither checked nor read.

    Raises:
      UserError: no such folder, not a model folder, another kind.
    """
    path = _recovered(folder)
    header = _read_header(path)
    if expect is not None and header["kind"] != expect:
        raise UserError(
            f"{path} holds a {header['kind']} model, and a {expect} model is needed here"
        )
    return ModelFolder(header["kind"], header["config"], header["metadata"], {})


def load(
    folder: str | os.PathLike[str],
    *,
    expect: Kind | None = None,
    abstract: Any = None,
    place: Place | None = None,
    unrolled: bool = False,
) -> ModelFolder:
    """Reads a model folder.

    Args:
      folder: local or gs://.
      expect: the kind that the caller can use.
      abstract: pytree of jax.ShapeDtypeStruct (or arrays) with the shapes that the params must have; dtypes may differ.
      place: what becomes of each array, for models that should not lie in memory twice, or in one piece: called with its path and the
        array as it lies on the disk, it returns what `params` shall have there, or None to leave it out. Without it, numpy arrays.
      unrolled: with `place`, stacked layers are handed to it one by one, as `transformer.stack.unstack` names them.

    Raises:
      UserError: no such folder, not a model folder, another kind, damaged weights, other names or shapes than `abstract`.
    """
    path = _recovered(folder)
    described = read_config(path, expect)
    _check_files(path, _read_header(path)["files"])
    read = stored_weights.read if place is None else stored_weights.open_arrays
    params = read(_weights(path))
    if abstract is not None:
        check_shapes(path, params, abstract)
    if place is not None:
        arrays = traverse_util.flatten_dict(params)
        if unrolled:
            arrays = {
                layer: part
                for name, array in arrays.items()
                for layer, part in stored_weights.layers(name, array)
            }
        placed = {name: place(name, array) for name, array in arrays.items()}
        params = traverse_util.unflatten_dict(
            {name: array for name, array in placed.items() if array is not None}
        )
    return dataclasses.replace(described, params=params)


def is_model_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether `load` would take it for one, complete or not."""
    try:
        _read_header(_recovered(folder))
    except UserError:
        return False
    return True


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _recovered(folder: str | os.PathLike[str]) -> epath.Path:
    """A folder to read, put back in its place if a kill of `save` has left it beside it."""
    if not _is_remote(path := epath.Path(folder)):
        whole_folder.recover(Path(os.path.realpath(folder)))
    return path


def _own_header(path: epath.Path) -> dict[str, Any] | None:
    """What config.json holds if it is one of ours, damaged or not in other respects."""
    try:
        header = inputs.read_json(path / "config.json", Any)
    except UserError:
        return None
    return header if isinstance(header, dict) and header.get("format") == "bitdance_jax" else None


def _foreign_file(path: epath.Path, header: dict[str, Any]) -> str | None:
    """A file in a model folder that `save` has not written."""
    names = {file.relative_to(path).as_posix() for file in _files(path)}
    others = sorted(names - {"config.json", *header.get("files", {})})
    if "files" not in header:  # an older one
        others = [name for name in others if not name.startswith("weights/")]
    return others[0] if others else None


def _write(
    folder: epath.Path, params: Params, header: dict[str, Any], further: Mapping[str, bytes]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in further.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    stored_weights.save(folder / "weights", params)
    written = [*_files(folder / "weights"), *(folder / name for name in further)]
    checksums = _checksums(written)
    files = {
        file.relative_to(folder).as_posix(): [file.stat().length, crc]
        for file, crc in zip(written, checksums, strict=True)
    }
    (folder / "config.json").write_text(json.dumps(header | {"files": files}, indent=2) + "\n")


def _files(folder: epath.Path) -> list[epath.Path]:
    children = sorted(folder.iterdir())
    return [file for child in children for file in (_files(child) if child.is_dir() else [child])]


def _checksums(files: Sequence[epath.Path]) -> list[int]:
    with ThreadPoolExecutor() as pool:  # zlib works beside other Python threads
        return list(pool.map(_crc32, files))


def _crc32(file: epath.Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _read_header(path: epath.Path) -> dict[str, Any]:
    check_text(path)
    if not path.exists():
        raise UserError(_advised(f"no model folder {path}", path))
    if not path.is_dir():
        raise UserError(_advised(f"{path} is not a model folder but a file", path))
    try:
        header = inputs.read_json(path / "config.json", Any)
    except inputs.MissingFile as error:
        raise UserError(
            _advised(f"{path} is not a model folder: it has no config.json", path)
        ) from error
    fields = {"format", "version", "kind", "config", "metadata"}
    if (
        not isinstance(header, dict)
        or not fields <= header.keys()
        or header["format"] != "bitdance_jax"
    ):
        raise UserError(
            _advised(
                f"{path} is not a model folder: its config.json is not one of bitdance_jax", path
            )
        )
    if not isinstance(header["config"], dict) or not isinstance(header["metadata"], dict):
        raise UserError(f"{path / 'config.json'} is damaged: config and metadata must be objects")
    if header["version"] == UNFINISHED:
        raise UserError(f"{path} was not written to its end; write it again")
    if header["version"] != 1:
        raise UserError(
            f"{path} has format version {short(header['version'])}, and this bitdance_jax reads version 1; update it"
        )
    where = path / "config.json"
    kind = inputs.convert(header["kind"], Kind, where=f"kind of {where}")
    files = inputs.convert(
        header.get("files", {}), dict[str, tuple[int, int]], where=f"files of {where}"
    )
    return header | {"kind": kind, "files": files}


def _advised(complaint: str, path: epath.Path) -> str:
    return "; ".join(filter(None, (complaint, unconverted.advice(path))))


def _check_files(path: epath.Path, files: dict[str, tuple[int, int]]) -> None:
    """Finds missing and cut files, and altered ones on a local disk (it reads every byte); TensorStore would not see an altered weight."""
    if outside := [name for name in files if {"/", ".."} & set(PurePosixPath(name).parts)]:
        raise UserError(
            f"{path / 'config.json'} names {outside[0]}, which is outside of the folder"
        )
    there = {path / name: entry for name, entry in files.items()}
    for file, (size, _) in there.items():
        if not file.exists():
            raise UserError(
                f"the model folder is incomplete: {file} is missing; fetch or write the folder again"
            )
        if file.stat().length != size:
            raise UserError(
                f"the model folder is damaged: {file} is not as it was written; fetch or write the folder again"
            )
    if not _is_remote(path):
        for file in {*there, *_files(path / "weights")}:
            inputs.check_file(file)  # neither a device nor a pipe
    checksums = [] if _is_remote(path) else _checksums(list(there))
    for (file, (_, checksum)), found in zip(there.items(), checksums, strict=False):
        if checksum != found:
            raise UserError(
                f"the model folder is damaged: {file} is not as it was written; fetch or write the folder again"
            )


def _weights(path: epath.Path) -> epath.Path:
    """Orbax reads no relative paths."""
    return path / "weights" if _is_remote(path) else epath.Path(os.path.abspath(path / "weights"))


def check_shapes(path: str | os.PathLike[str], params: Params, abstract: Any) -> None:
    """Raises a UserError that names the first parameter which is missing, unknown or of another shape than in `abstract`."""
    saved, wanted = (
        {name: tuple(x.shape) for name, x in traverse_util.flatten_dict(tree, sep="/").items()}
        for tree in (params, abstract)
    )
    wrong = sorted(
        name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)
    )
    if wrong:
        name, more = wrong[0], len(wrong) - 1
        there, here = saved.get(name, "missing"), wanted.get(name, "missing")
        raise UserError(
            f"the weights in {path} do not fit the model: {name} is {there} there and {here} here; {more} more differ"
        )
