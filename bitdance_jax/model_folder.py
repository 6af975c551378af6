"""A model folder: `config.json` and the Orbax checkpoint `weights/`, on a local disk or under gs://.

The embedded model, a converted official one and a finished training run are all this. config.json is
`{"format": "bitdance_jax", "version": 1, "kind": ..., "config": {...}, "metadata": {...}}`.
"""

import json
import os
import shutil
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
    text = json.dumps(header, indent=2) + "\n"
    if "://" in str(folder):
        (target / "config.json").unlink(missing_ok=True)
        _write(target, params, text)
        return
    target = epath.Path(os.path.abspath(folder))
    new, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    _write(new, params, text)
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
    params = _read_weights(path)
    if abstract is not None:
        _check_shapes(path, params, abstract)
    return ModelFolder(header["kind"], header["config"], header["metadata"], params)


def _write(folder: epath.Path, params: Params, header: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "weights", params, force=True)
    (folder / "config.json").write_text(header)


def _read_header(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"no model folder {path}")
    try:
        header = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is not a model folder: it has no config.json") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read ({error})") from error
    if not isinstance(header, dict) or header.get("format") != "bitdance_jax" or not {"kind", "config", "metadata"} <= header.keys():
        raise UserError(f"{path} is not a model folder: its config.json is not one of bitdance_jax")
    if header.get("version") != 1:
        raise UserError(f"{path} has format version {header.get('version')}, and this bitdance_jax reads version 1; update it")
    return header


def _read_weights(path: epath.Path) -> Params:
    """The weights as numpy arrays: independent of the devices that they were saved from."""
    weights = path / "weights"
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            names = checkpointer.metadata(weights).item_metadata.tree
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            return checkpointer.restore(weights, restore_args=numpy)
    except Exception as error:  # Orbax and TensorStore raise many types for a file that is missing, cut or garbled.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the weights in {weights} are damaged or incomplete ({reason}); fetch or write the folder again") from error


def _check_shapes(path: epath.Path, params: Params, abstract: Any) -> None:
    saved, wanted = ({name: tuple(x.shape) for name, x in traverse_util.flatten_dict(tree, sep="/").items()} for tree in (params, abstract))
    wrong = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"the weights in {path} do not fit the model: {name} is {saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} in "
            f"the model ({len(wrong)} in all)"
        )
