"""Writes the models of tests/golden as released files."""

import functools
import json
from pathlib import Path
from typing import Any

import golden_models
import numpy as np
import torch_writer
from torch_writer import Call


def state_dict(name: str) -> dict[str, np.ndarray]:
    """Of a class-conditional model with its tokenizer under `vae.`, float32."""
    return dict(_state_dict(name))


@functools.cache
def _state_dict(name: str) -> dict[str, np.ndarray]:
    tokenizer = {
        f"vae.{key}": array for key, array in golden_models.read("tokenizer/weights").items()
    }
    return golden_models.read(f"{name}/weights") | tokenizer


def arguments(name: str) -> dict[str, Any]:
    return json.loads((golden_models.GOLDEN / name / "config.json").read_text())


def save_pt(
    path: Path,
    name: str,
    *,
    args: dict[str, Any] | None = None,
    ema: dict[str, np.ndarray] | None = None,
) -> Path:
    """Writes a released .pt. Its raw weights are the EMA weights plus 1."""
    ema = state_dict(name) if ema is None else ema
    model = {key: array + 1 for key, array in ema.items()}
    namespace = Call("argparse.Namespace", (), arguments(name) if args is None else args)
    return torch_writer.save(path, {"ema": ema, "model": model, "epochs": 1, "args": namespace})
