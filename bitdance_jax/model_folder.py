"""A model folder: `config.json` and the Orbax checkpoint `weights/`, on a local disk or under gs://.

The embedded model, a converted official one and a finished training run are all this. config.json is
`{"format": "bitdance_jax", "version": 1, "kind": ..., "config": {...}, "metadata": {...}, "files": {name: [bytes, CRC-32]}}`.
"""

import json
import os
import shutil
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from bitdance_jax.errors import UserError


Kind = Literal["tokenizer", "class_conditional"]
Params = dict[str, Any]


@dataclass(frozen=True)
class ModelFolder:
    """A model read from disk.

    Attributes:
      kind: what the folder holds.
      config: the model's config as plain data (`bitdance_jax.config.from_dict` makes it one).
      metadata: whatever the writer noted: steps, data, figures.
      params: nested dict of numpy arrays, in the dtypes they were saved in.
    """

    kind: Kind
    config: dict[str, Any]
    metadata: dict[str, Any]
    params: Params


def save(folder: str | os.PathLike[str], *, kind: Kind, config: dict[str, Any], params: Params, metadata: dict[str, Any]) -> None:
    """Writes a model folder; one that is there already is replaced once the new one is complete.

    A local folder is written beside its place and renamed. Under gs://, where nothing can be renamed, config.json is removed first and
    written last: a folder without it is not a model.
    """
    target = epath.Path(folder)
    header = {"format": "bitdance_jax", "version": 1, "kind": kind, "config": config, "metadata": metadata}
    if _is_remote(target):
        (target / "config.json").unlink(missing_ok=True)
        _write(target, params, header)
        return
    target = epath.Path(os.path.abspath(folder))
    new, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        _write(new, params, header)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: str | os.PathLike[str], *, expect: Kind | None = None, abstract: Any = None) -> ModelFolder:
    """Reads a model folder.

    Args:
      folder: local or gs://.
      expect: the kind that the caller can use.
      abstract: pytree of jax.ShapeDtypeStruct (or arrays) with the shapes that the params must have; dtypes may differ.

    Raises:
      UserError: no such folder, not a model folder, another kind, damaged weights, other names or shapes than `abstract`.
    """
    path = epath.Path(folder)
    header = _read_header(path)
    if expect is not None and header["kind"] != expect:
        raise UserError(f"{path} holds a {header['kind']} model, and a {expect} model is needed here")
    _check_files(path, header.get("files", {}))
    params = _read_weights(path)
    if abstract is not None:
        check_shapes(path, params, abstract)
    return ModelFolder(header["kind"], header["config"], header["metadata"], params)


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _write(folder: epath.Path, params: Params, header: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "weights", params, force=True)
    files = {str(file.relative_to(folder)): [file.stat().length, _crc32(file)] for file in _files(folder / "weights")}
    (folder / "config.json").write_text(json.dumps(header | {"files": files}, indent=2) + "\n")


def _files(folder: epath.Path) -> list[epath.Path]:
    children = sorted(folder.iterdir())
    return [file for child in children for file in (_files(child) if child.is_dir() else [child])]


def _crc32(file: epath.Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _read_header(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"no model folder {path}")
    try:
        header = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is not a model folder: it has no config.json") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read ({error})") from error
    fields = {"format", "version", "kind", "config", "metadata"}
    if not isinstance(header, dict) or not fields <= header.keys() or header["format"] != "bitdance_jax":
        raise UserError(f"{path} is not a model folder: its config.json is not one of bitdance_jax")
    if not isinstance(header["config"], dict) or not isinstance(header["metadata"], dict):
        raise UserError(f"{path / 'config.json'} is damaged: config and metadata must be objects")
    if header["version"] != 1:
        raise UserError(f"{path} has format version {header['version']}, and this bitdance_jax reads version 1; update it")
    return header


def _check_files(path: epath.Path, files: dict[str, list[int]]) -> None:
    """Finds missing and cut files, and altered ones on a local disk (it reads every byte); TensorStore would not see an altered weight."""
    for name, (size, checksum) in files.items():
        file = path / name
        if not file.exists():
            raise UserError(f"the model folder is incomplete: {file} is missing; fetch or write the folder again")
        if file.stat().length != size or not (_is_remote(path) or _crc32(file) == checksum):
            raise UserError(f"the model folder is damaged: {file} is not as it was written; fetch or write the folder again")


def _read_weights(path: epath.Path) -> Params:
    """The weights as numpy arrays: independent of the devices that they were saved from."""
    weights = path / "weights"
    if not _is_remote(path):
        weights = epath.Path(os.path.abspath(weights))  # Orbax reads no relative paths.
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            names = checkpointer.metadata(weights).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            return checkpointer.restore(weights, restore_args=as_numpy)
    except Exception as error:  # Orbax and TensorStore raise many types for a checkpoint that they cannot read.
        raise UserError(f"the weights in {weights} cannot be read; fetch or write the folder again") from error


def check_shapes(path: str | os.PathLike[str], params: Params, abstract: Any) -> None:
    """Raises a UserError that names the first parameter which is missing, unknown or of another shape than in `abstract`."""
    saved, wanted = ({name: tuple(x.shape) for name, x in traverse_util.flatten_dict(tree, sep="/").items()} for tree in (params, abstract))
    wrong = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if wrong:
        name, more = wrong[0], len(wrong) - 1
        there, here = saved.get(name, "missing"), wanted.get(name, "missing")
        raise UserError(f"the weights in {path} do not fit the model: {name} is {there} there and {here} here; {more} more differ")
