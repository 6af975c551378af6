"""Settings of all tests: CPU, exact products, fast compilation, run-time checks of array shapes."""

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import jaxtyping
import pytest


os.environ.setdefault("JAX_PLATFORMS", "cpu")
ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"
if ON_CPU:
    # Most tests compile for longer than they run. Others use `compiling.optimized`.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# The tests compile what they test, and leave the user's cache alone.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
sys.path.insert(0, str(Path(__file__).parent))  # for the shared modules of tests

PACKAGE = Path(__file__).parents[1] / "bitdance_jax"
# All modules but two without arrays, whose annotations beartype cannot check: `Self` in config, and
# those that nn.linear inherits from Flax.
MODULES = [
    f"bitdance_jax.{path.stem}" for path in PACKAGE.iterdir() if path.stem not in ("config", "nn")
]
MODULES += [
    f"bitdance_jax.nn.{path.stem}"
    for path in (PACKAGE / "nn").glob("*.py")
    if path.stem != "linear"
]
jaxtyping.install_import_hook(MODULES, "beartype.beartype")

import compiling  # noqa: E402
import jax  # noqa: E402
import processes  # noqa: E402
from few_emoji import replace_emoji  # noqa: E402


if ON_CPU:  # also for the processes that the tests start
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *processes.QUICK]).strip()

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", ON_CPU)  # also if a plugin imported JAX before
jax.config.update("jax_enable_compilation_cache", False)


COMPILING = {"heads", "models", "pipelines", "sampling", "tokenizer", "train", "transformer"}
"""Folders of tests that take about a second each; most others are quicker."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist
        config.option.loadscopereorder = False  # keeps the order below


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that all workers end at about the same time."""
    seconds: Counter[Path] = Counter()
    for item in items:
        slow = item.get_closest_marker("slow")
        quick = 1 if item.path.parent.name in COMPILING else 0.1
        seconds[item.path] += (slow.args or (5,))[0] if slow else quick
    items.sort(key=lambda item: -seconds[item.path])


@pytest.fixture(scope="module")
def optimized():
    """Compiles the programs of a module with all optimizations, as for users."""
    with compiling.optimized():
        yield


@pytest.fixture(scope="module")
def few_emoji(tmp_path_factory):
    """A few small images of 9 classes in place of the embedded ones."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        replace_emoji(monkeypatch, tmp_path_factory.mktemp("emoji"))
        yield


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The toy training run, as a module."""
    path = Path(__file__).parent / "train" / "toy_run.py"
    spec = importlib.util.spec_from_file_location("toy_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def as_users_call(monkeypatch):
    """Disables the hook above, which would refuse wrong arguments before the package does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
