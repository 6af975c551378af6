"""A model folder: `config.json` and the Orbax checkpoint `weights/`, on a local disk or under gs://.

The embedded model, a converted official model and a finished training run have this form.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from etils import epath
from flax import traverse_util

from bitdance_jax.errors import FileError
from bitdance_jax.io import atomic, lazy_array, manifest, orbax_weights, paths
from bitdance_jax.io.manifest import Kind, Manifest
from bitdance_jax.io.orbax_weights import StoredArray


Params = dict[str, Any]

ReadArray = Callable[[tuple[str, ...], StoredArray], Any]
"""Of a parameter's path and its stored array: what `load` returns for it; None omits it."""


@dataclass(frozen=True)
class ModelFolder:
    """A model read from disk.

    Attributes:
      kind: of the model.
      config: the model's config as plain data (`bitdance_jax.config.from_dict` decodes it).
      metadata: whatever the writer recorded: steps, data, metrics.
      params: nested dict of numpy arrays in their stored dtypes, or of what `read_array` returned.
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

    A local folder is replaced atomically. Under gs://, where nothing can be renamed, config.json
    has the version UNFINISHED until everything else is written.

    Args:
      folder: local or gs://.
      kind: see ModelFolder.
      config: see ModelFolder.
      params: nested dict of arrays, `LazyArray` among them.
      metadata: see ModelFolder.
      files: further files, by their path in the folder.
      force: replace an existing model; see `check_writable`.

    Raises:
      FileError: the folder exists and may not be replaced, or cannot be written. The old content
        remains, unless it was under gs://.
    """
    check_writable(folder, force=force)
    header = Manifest(kind, config, metadata, {})
    params = jax.tree.map(lazy_array.as_lazy, params)
    if paths.is_remote(target := epath.Path(folder)):
        with atomic.write_errors(str(target)):
            target.mkdir(parents=True, exist_ok=True)
            manifest.write(target, header, manifest.UNFINISHED)
            _write(target, params, header, files)
        return
    num_bytes = sum(array.nbytes for array in jax.tree.leaves(params))
    with atomic.replace_folder(folder, num_bytes) as new:
        _write(epath.Path(new), params, header, files)
        check_writable(folder, force=force)  # again: writing may have taken hours


def check_writable(folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """Checks that `save` may write to a folder: it is new or empty, or with `force` a model folder.

    Raises:
      FileError: it holds something else, a model without `force`, or files of other programs; or
        Orbax cannot write to a path of this name.
    """
    paths.check_checkpoint_path(folder)
    path = _recovered(folder)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    header = manifest.read_ours(path)
    if header is None:
        raise FileError(f"{folder} exists and is not a model folder; choose another path")
    if header.get("version") != manifest.UNFINISHED and not force:
        raise FileError(f"{folder} holds a model already; choose another path, or force=True")
    if not paths.is_remote(path) and (foreign := _foreign_file(path, header)):
        raise FileError(f"{folder} holds {foreign}, which is not of its model; move it elsewhere")


def read_config(folder: str | os.PathLike[str], expect: Kind | None = None) -> ModelFolder:
    """A model folder without its params, which are neither checked nor read.

    Raises:
      FileError: no such folder, not a model folder, or another kind of model.
    """
    return _described(_recovered(folder), expect)[0]


def load(
    folder: str | os.PathLike[str],
    *,
    expect: Kind | None = None,
    abstract: Any = None,
    read_array: ReadArray | None = None,
    unrolled: bool = False,
) -> ModelFolder:
    """Reads a model folder.

    Args:
      folder: local or gs://.
      expect: the kind of model that the caller can use.
      abstract: pytree of jax.ShapeDtypeStruct (or arrays) with the expected shapes of the params;
        dtypes may differ.
      read_array: reads each array, for models that should not be in memory twice or unsharded.
        Without it, all are numpy arrays.
      unrolled: with `read_array`, it gets each layer of a stack by itself, with the path that
        `nn.stack.unstack` gives it.

    Raises:
      FileError: no such folder, not a model folder, another kind of model, damaged weights, or
        other names or shapes than `abstract`.
    """
    path = _recovered(folder)
    described, header = _described(path, expect)
    manifest.check_files(path, header.files)
    # Orbax reads no relative paths.
    weights = (
        path / "weights" if paths.is_remote(path) else epath.Path(os.path.abspath(path / "weights"))
    )
    if read_array is None:
        params = orbax_weights.read(weights)
    else:
        params = orbax_weights.open_arrays(weights)
    if abstract is not None:
        check_shapes(path, params, abstract)
    if read_array is not None:
        params = _read_arrays(params, read_array, unrolled)
    return ModelFolder(described.kind, described.config, described.metadata, params)


def is_model_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder has the config.json of a model folder, complete or not."""
    try:
        manifest.read(_recovered(folder))
    except FileError:
        return False
    return True


def check_shapes(path: str | os.PathLike[str], params: Params, abstract: Any) -> None:
    """Checks that params have the names and shapes of `abstract`.

    Raises:
      FileError: it names the first parameter that is missing, unknown or of another shape.
    """
    found = _shapes(params)
    expected = _shapes(abstract)
    names = sorted(found.keys() | expected.keys())
    wrong = [name for name in names if found.get(name) != expected.get(name)]
    if wrong:
        name = wrong[0]
        raise FileError(
            f"the weights in {path} do not fit the model: {name} is {found.get(name, 'missing')}"
            f" there and {expected.get(name, 'missing')} in the model; {len(wrong) - 1} more differ"
        )


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(params, sep="/")
    return {name: tuple(array.shape) for name, array in flat.items()}


def _read_arrays(params: Params, read_array: ReadArray, unrolled: bool) -> Params:
    arrays = traverse_util.flatten_dict(params)
    if unrolled:
        arrays = {
            layer: part
            for name, array in arrays.items()
            for layer, part in orbax_weights.unstack_layers(name, array)
        }
    read = {name: read_array(name, array) for name, array in arrays.items()}
    return traverse_util.unflatten_dict(
        {name: array for name, array in read.items() if array is not None}
    )


def _described(path: epath.Path, expect: Kind | None) -> tuple[ModelFolder, Manifest]:
    header = manifest.read(path)
    if expect is not None:
        manifest.require_kind(path, header.kind, expect)
    return ModelFolder(header.kind, header.config, header.metadata, {}), header


def _recovered(folder: str | os.PathLike[str]) -> epath.Path:
    """A folder to read, restored if a kill of `save` has left it under a temporary name."""
    path = epath.Path(folder)
    if not paths.is_remote(path):
        atomic.recover_folder(Path(os.path.realpath(folder)))
    return path


def _foreign_file(path: epath.Path, header: dict[str, Any]) -> str | None:
    """The first file in a model folder that `save` has not written."""
    names = {file.relative_to(path).as_posix() for file in manifest.list_files(path)}
    others = sorted(names - {manifest.FILE, *header.get("files", {})})
    if "files" not in header:  # a folder of an earlier bitdance_jax
        others = [name for name in others if not name.startswith("weights/")]
    return others[0] if others else None


def _write(
    folder: epath.Path, params: Params, header: Manifest, further: Mapping[str, bytes]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in further.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    weights = folder / "weights"
    orbax_weights.save(weights, params)
    written = [*manifest.list_files(weights), *(folder / name for name in further)]
    files = manifest.describe(folder, written)
    manifest.write(folder, Manifest(header.kind, header.config, header.metadata, files))
