"""What stands where a model folder should, and the command that makes one of it."""

import os
import re
from pathlib import Path


CONVERT = "python -m bitdance_jax.convert"
WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
OWN_PLACE = "models"
"""The folder in which the commands of the documentation keep models: no owner on the Hugging Face hub."""


def advice(path: str | os.PathLike[str]) -> str:
    """A clause that says how to get a model folder in the place of `path`, which is none; "" where nothing is known to help."""
    place = Path(path)
    if "://" in str(path):
        return f"a released model is converted first: {CONVERT} RELEASED {path}"
    if not place.exists():
        return _missing(place)
    name = f"models/{re.sub('[^A-Za-z0-9_-]+', '_', place.stem if place.is_file() else place.resolve().name)}"
    if place.is_file():
        return (
            f"convert it first: {CONVERT} {place} {name}"
            if place.suffix in WEIGHTS
            else "a model is a folder"
        )
    below = _names_below(place)
    if models := [
        name
        for name in below
        if name.endswith("/config.json") and (place / name).with_name("weights").is_dir()
    ]:
        return f"the model folders in it are: {', '.join(sorted(str(place / name.partition('/')[0]) for name in models)[:10])}"
    if any(name.endswith(WEIGHTS) or name == "model_index.json" for name in below):
        return f"it holds released files, which are converted first: {CONVERT} {place} {name}"
    return ""


def _missing(place: Path) -> str:
    run = place.parent if place.name == "model" and place.parent.name else place
    if (run / "model.json").is_file():
        return f"the run {run} is not finished; give {run} for its newest weights"
    if run != place or place.parts[0] == "runs":
        return f"a run writes it: python train.py CONFIG --run.workdir {run}"
    owner, _, repository = str(place).partition("/")
    if (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(place))
        and owner != OWN_PLACE
        and not Path(owner).exists()
    ):
        return f"a model of the Hugging Face hub is converted first: {CONVERT} {place} models/{repository}"
    return f"a released model is converted first: {CONVERT} RELEASED {place}"


def _names_below(folder: Path) -> list[str]:
    """Files in a folder and in its sub-folders, as paths within it."""
    try:
        children = sorted(folder.iterdir())
        return [
            file.relative_to(folder).as_posix()
            for child in children
            for file in (child.iterdir() if child.is_dir() else [child])
        ]
    except OSError:
        return []
