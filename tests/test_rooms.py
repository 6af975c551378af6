"""The package is a row of rooms: a module imports from its own room and from those before it."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "bitdance_jax"
ROOMS = (
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
    "data",
    "pipelines",
    "train",
    "evaluate",
    "plan",
    "cli",
    "app",
)
"""In the order in which they may import."""

COMMANDS = ("data/tokenize.py", "evaluate/prompts.py", "evaluate/sweep.py", "plan/text_to_image.py")
"""Still to be split into a part of their room and a command in cli."""


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


def test_every_folder_is_a_room():
    folders = {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()
    }
    assert folders == set(ROOMS) - {"errors"}


@pytest.mark.parametrize("name", ROOMS)
def test_imports_only_from_the_rooms_before(name):
    files = [PACKAGE / f"{name}.py"] if name == "errors" else sorted((PACKAGE / name).rglob("*.py"))
    allowed = ROOMS[: ROOMS.index(name) + 1]
    # A command's entry point runs what stands in cli.
    backwards = {
        f"{file.relative_to(PACKAGE)}: {module}"
        for file in files
        if file.name != "__main__.py" and str(file.relative_to(PACKAGE)) not in COMMANDS
        for module in imported(file)
        if room(module) not in allowed
    }
    assert not backwards
