"""Hints for a path that is not a model folder: usually the command that converts it to one."""

import os
import re
from pathlib import Path


CONVERT = "bitdance convert"
WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
MODELS = "models"
"""The folder for models in the documentation's commands; not the owner of a Hugging Face model."""


def hint(path: str | os.PathLike[str]) -> str:
    """A clause for the error message about `path`, which is not a model folder; may be empty."""
    local = Path(path)
    if "://" in str(path):
        return f"a released model is converted first: {CONVERT} RELEASED {path}"
    if not local.exists():
        return _missing(local)
    stem = local.stem if local.is_file() else local.resolve().name
    out = f"{MODELS}/{re.sub('[^A-Za-z0-9_-]+', '_', stem)}"
    if local.is_file() and local.suffix in WEIGHT_SUFFIXES:
        return f"convert it first: {CONVERT} {local} {out}"
    if local.is_file():
        return "a model is a folder"
    names = _file_names(local)
    configs = [local / name for name in names if name.endswith("/config.json")]
    models = sorted(str(file.parent) for file in configs if file.with_name("weights").is_dir())
    if models:
        return f"the model folders in it are: {', '.join(models[:10])}"
    if any(Path(name).name == "adapter_config.json" for name in names):
        return f"it is a LoRA adapter: give its base model as the model, and {local} as lora"
    if any(name.endswith(WEIGHT_SUFFIXES) or name == "model_index.json" for name in names):
        return f"it holds released files, which are converted first: {CONVERT} {local} {out}"
    return ""


def _missing(path: Path) -> str:
    run = path.parent if path.name == "model" and path.parent.name else path
    if (run / "model.json").is_file():
        return f"the run {run} is not finished; give {run} for its newest weights"
    if run != path or path.parts[0] == "runs":
        return f"a run writes it: bitdance train CONFIG --run.workdir {run}"
    return f"a released model is converted first: {CONVERT} RELEASED {path}"


def _file_names(folder: Path) -> list[str]:
    """Relative paths of the files in a folder and in its sub-folders."""
    try:
        return [
            file.relative_to(folder).as_posix()
            for child in sorted(folder.iterdir())
            for file in (child.iterdir() if child.is_dir() else [child])
        ]
    except OSError:
        return []
