"""A wheel carries everything a user needs, and works in an environment outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from bitdance_jax.version import __version__


ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the sources with a checkpoint added, and the wheel of it."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that neither a stale build folder nor this test's additions mix with the checkout.
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "bitdance_jax",
        folder / "bitdance_jax",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    checkpoint = folder / "bitdance_jax" / "assets" / "example" / "weights" / "d"
    checkpoint.mkdir(parents=True)
    # Orbax names its files without an extension.
    (checkpoint / "0123456789abcdef").write_bytes(b"weights")
    (checkpoint.parent / "_METADATA").write_text("{}")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    pip(["wheel", *flags, "."], folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return folder, wheel


def pip(arguments, folder):
    subprocess.run([sys.executable, "-m", "pip", *arguments], cwd=folder, check=True)


def test_the_wheel_holds_all_modules_and_assets(built):
    folder, wheel = built
    expected = {
        str(path.relative_to(folder))
        for path in (folder / "bitdance_jax").rglob("*")
        if path.is_file()
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= names
    assert "bitdance_jax/py.typed" in names
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}


@pytest.fixture(scope="module")
def bitdance(built, tmp_path_factory):
    """Runs the command of a fresh environment; the dependencies are those of this one."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    scripts = root / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(root), "platbase": str(root)})
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _, wheel = built
    pip(["--python", str(python), "install", "--quiet", "--no-deps", str(wheel)], root)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments, folder):
        command = [scripts / "bitdance", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=True
        ).stdout

    where = [python, "-c", "import bitdance_jax; print(bitdance_jax.__file__)"]
    found = subprocess.run(where, cwd=root, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(root), found.stderr
    return run


def test_the_installed_command(bitdance, tmp_path):
    assert bitdance("--version", folder=tmp_path) == f"bitdance {__version__}\n"
    assert "evaluate-prompts" in bitdance("--help", folder=tmp_path)


def test_the_installed_command_generates_images(bitdance, tmp_path):
    flags = ["--labels", "flag", "--per-label", "2", "--head-steps", "2"]
    assert "2 images of 1 label" in bitdance("sample", *flags, folder=tmp_path)
    assert (tmp_path / "samples.png").exists()


def test_the_installed_command_trains(bitdance, tmp_path):
    flags = ["--trial", "--run.steps", "2", "--run.preview-every", "2", "--run.workdir", "run"]
    bitdance("train", "emoji_4x", *flags, "--preview.head-steps", "1", folder=tmp_path)
    out = bitdance(
        "sample", "--checkpoint", "run/model", "--head-steps", "1", "--per-label", "2",
        "--labels", "drink", folder=tmp_path,
    )  # fmt: skip
    assert "2 images of 1 label" in out
