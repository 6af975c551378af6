"""A model folder: `config.json` and the Orbax checkpoint `weights/`, on a local disk or under gs://.

The embedded model, a converted official one and a finished training run are all this. config.json is
`{"format": "bitdance_jax", "version": 1, "kind": ..., "config": {...}, "metadata": {...}, "files": {name: [bytes, CRC-32]}}`.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import traverse_util

from bitdance_jax import unconverted
from bitdance_jax.errors import UserError
from bitdance_jax.transformer.stack import STACKED, stacked_axes


Kind = Literal["tokenizer", "class_conditional", "text_to_image"]
Params = dict[str, Any]


class StoredArray:
    """An array on the disk: what is indexed is read, and nothing else. `jax.make_array_from_callback` makes a sharded array of one.

    Attributes:
      shape, dtype: its own.
    """

    def __init__(self, store: tensorstore.TensorStore, weights: epath.Path) -> None:
        self._store, self._weights = store, weights
        self.shape: tuple[int, ...] = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """The values at integers from 0 up, slices or `...`, as of a numpy array; a UserError if they are damaged."""
        part = self._store[index]
        with _readable(self._weights):
            return np.asarray(part.read().result())

    def part(self, index: tuple[int, ...]) -> "StoredArray":
        """The array at these first indices, still unread."""
        return StoredArray(self._store[index], self._weights) if index else self


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
) -> None:
    """Writes a model folder; one that is there already is replaced once the new one is complete. `files` are further ones, by their path.

    A local folder is written beside its place and renamed. Under gs://, where nothing can be renamed, config.json is removed first and
    written last: a folder without it is not a model.
    """
    target = epath.Path(folder)
    header = {"format": "bitdance_jax", "version": 1, "kind": kind, "config": config, "metadata": metadata}
    if _is_remote(target):
        (target / "config.json").unlink(missing_ok=True)
        _write(target, params, header, files)
        return
    target = epath.Path(os.path.abspath(folder))
    new, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        _write(new, params, header, files)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def read_config(folder: str | os.PathLike[str], expect: Kind | None = None) -> ModelFolder:
    """What `load` gives, but for the params, which are neither checked nor read.

    Raises:
      UserError: no such folder, not a model folder, another kind.
    """
    path = epath.Path(folder)
    header = _read_header(path)
    if expect is not None and header["kind"] != expect:
        raise UserError(f"{path} holds a {header['kind']} model, and a {expect} model is needed here")
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
    path = epath.Path(folder)
    described = read_config(path, expect)
    _check_files(path, _read_header(path).get("files", {}))
    params = _read_weights(path) if place is None else _open_weights(path)
    if abstract is not None:
        check_shapes(path, params, abstract)
    if place is not None:
        arrays = traverse_util.flatten_dict(params)
        if unrolled:
            arrays = {layer: part for name, array in arrays.items() for layer, part in _layers(name, array)}
        placed = {name: place(name, array) for name, array in arrays.items()}
        params = traverse_util.unflatten_dict({name: array for name, array in placed.items() if array is not None})
    return dataclasses.replace(described, params=params)


def is_model_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether `load` would take it for one, complete or not."""
    try:
        _read_header(epath.Path(folder))
    except UserError:
        return False
    return True


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _write(folder: epath.Path, params: Params, header: dict[str, Any], further: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in further.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with _checkpointer() as checkpointer:
        checkpointer.save(folder / "weights", params, force=True)
    written = [*_files(folder / "weights"), *(folder / name for name in further)]
    checksums = _checksums(written)
    files = {str(file.relative_to(folder)): [file.stat().length, crc] for file, crc in zip(written, checksums, strict=True)}
    (folder / "config.json").write_text(json.dumps(header | {"files": files}, indent=2) + "\n")


def _checkpointer() -> ocp.Checkpointer:
    """Orbax's, for this process alone: in a job of several only the first one writes a model folder, and none waits for another."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}")
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


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
    if not path.exists():
        raise UserError(_advised(f"no model folder {path}", path))
    if not path.is_dir():
        raise UserError(_advised(f"{path} is not a model folder but a file", path))
    try:
        header = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise UserError(_advised(f"{path} is not a model folder: it has no config.json", path)) from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read ({error})") from error
    fields = {"format", "version", "kind", "config", "metadata"}
    if not isinstance(header, dict) or not fields <= header.keys() or header["format"] != "bitdance_jax":
        raise UserError(_advised(f"{path} is not a model folder: its config.json is not one of bitdance_jax", path))
    if not isinstance(header["config"], dict) or not isinstance(header["metadata"], dict):
        raise UserError(f"{path / 'config.json'} is damaged: config and metadata must be objects")
    if header["version"] != 1:
        raise UserError(f"{path} has format version {header['version']}, and this bitdance_jax reads version 1; update it")
    return header


def _advised(complaint: str, path: epath.Path) -> str:
    return "; ".join(filter(None, (complaint, unconverted.advice(path))))


def _check_files(path: epath.Path, files: dict[str, list[int]]) -> None:
    """Finds missing and cut files, and altered ones on a local disk (it reads every byte); TensorStore would not see an altered weight."""
    there = {path / name: entry for name, entry in files.items()}
    for file, (size, _) in there.items():
        if not file.exists():
            raise UserError(f"the model folder is incomplete: {file} is missing; fetch or write the folder again")
        if file.stat().length != size:
            raise UserError(f"the model folder is damaged: {file} is not as it was written; fetch or write the folder again")
    checksums = [] if _is_remote(path) else _checksums(list(there))
    for (file, (_, checksum)), found in zip(there.items(), checksums, strict=False):
        if checksum != found:
            raise UserError(f"the model folder is damaged: {file} is not as it was written; fetch or write the folder again")


def _read_weights(path: epath.Path) -> Params:
    """The weights as numpy arrays: independent of the devices that they were saved from."""
    weights = _weights(path)
    with _readable(weights), _checkpointer() as checkpointer:
        names = checkpointer.metadata(weights).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        return checkpointer.restore(weights, restore_args=as_numpy)


def _open_weights(path: epath.Path) -> Params:
    """The weights, unread."""
    weights = _weights(path)
    base = str(weights) if _is_remote(path) else f"file://{weights}"
    with _readable(weights), _checkpointer() as checkpointer:
        names = traverse_util.flatten_dict(checkpointer.metadata(weights).item_metadata.tree)
        specs = [
            {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"{base}/", "path": f"{'.'.join(name)}/"}, "open": True}
            for name in names
        ]
        context = tensorstore.Context()
        opening = [tensorstore.open(spec, context=context) for spec in specs]
        stored = [StoredArray(store.result(), weights) for store in opening]
        return traverse_util.unflatten_dict(dict(zip(names, stored, strict=True)))


def _layers(path: tuple[str, ...], array: StoredArray) -> Iterator[tuple[tuple[str, ...], StoredArray]]:
    for index in np.ndindex(*array.shape[: stacked_axes(path)]):
        numbers = iter(index)
        yield tuple(f"{name}_{next(numbers)}" if name in STACKED else name for name in path), array.part(index)


def _weights(path: epath.Path) -> epath.Path:
    """Orbax reads no relative paths."""
    return path / "weights" if _is_remote(path) else epath.Path(os.path.abspath(path / "weights"))


@contextlib.contextmanager
def _readable(weights: epath.Path) -> Iterator[None]:
    try:
        yield
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
