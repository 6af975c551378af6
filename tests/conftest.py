"""Runs before any test module is imported: the CPU by default, exact products, and array shapes checked at run time."""

import os
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import safetensors.numpy


os.environ.setdefault("JAX_PLATFORMS", "cpu")

PACKAGE = Path(__file__).parents[1] / "bitdance_jax"
# All but config, which has no arrays, and whose `Self` beartype cannot check in methods decorated one by one.
MODULES = [f"bitdance_jax.{path.stem}" for path in PACKAGE.iterdir() if path.stem != "config"]
jaxtyping.install_import_hook(MODULES, "beartype.beartype")

import jax  # noqa: E402


jax.config.update("jax_default_matmul_precision", "highest")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """`golden("tokenizer/io")` reads tests/golden/tokenizer/io.safetensors; its bfloat16 tensors become float32."""

    def read(name: str) -> dict[str, np.ndarray]:
        tensors = safetensors.numpy.load_file(GOLDEN / f"{name}.safetensors")
        return {key: value.astype(np.float32) if value.dtype.name == "bfloat16" else value for key, value in tensors.items()}

    return read
