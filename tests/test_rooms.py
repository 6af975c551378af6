"""The folders of the package are in an order: a module imports from its own and earlier ones."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "bitdance_jax"
FILES = {"version", "errors"}
ROOMS = (
    "version",
    "errors",
    "config",
    "perf",
    "distributed",
    "nn",
    "tokenizer",
    "transformer",
    "heads",
    "models",
    "sampling",
    "io",
    "text",
    "convert",
    "fid",
    "data",
    "pipelines",
    "train",
    "configs",
    "evaluate",
    "plan",
    "cli",
    "app",
)
"""In the order in which they may import."""


def room(module: str) -> str:
    return module.split(".")[1]


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, wherever in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "bitdance_jax":
            modules |= {f"bitdance_jax.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return {module for module in modules if module.startswith("bitdance_jax.")}


def is_entry(file: Path) -> bool:
    """Whether a file only starts a command: `python -m` with its name."""
    return imported(file) == {"bitdance_jax.cli.main"}


def test_every_folder_is_a_room():
    folders = {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()
    }
    assert folders == set(ROOMS) - FILES


@pytest.mark.parametrize("name", ROOMS)
def test_imports_only_from_the_rooms_before(name):
    files = [PACKAGE / f"{name}.py"] if name in FILES else sorted((PACKAGE / name).rglob("*.py"))
    allowed = ROOMS[: ROOMS.index(name) + 1]
    backwards = {
        f"{file.relative_to(PACKAGE)}: {module}"
        for file in files
        if not is_entry(file)
        for module in imported(file)
        if room(module) not in allowed
    }
    assert not backwards
