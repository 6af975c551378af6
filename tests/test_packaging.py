"""A wheel carries everything a user needs: the package's modules and every file under assets."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_holds_modules_and_assets(tmp_path):
    # A copy, so that neither a stale build folder nor this test's additions mix with the checkout.
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "bitdance_jax",
        tmp_path / "bitdance_jax",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    checkpoint = tmp_path / "bitdance_jax" / "assets" / "example" / "weights" / "d"
    checkpoint.mkdir(parents=True)
    (checkpoint / "0123456789abcdef").write_bytes(b"as Orbax names its files: no extension")
    (checkpoint.parent / "_METADATA").write_text("{}")
    expected = {
        str(path.relative_to(tmp_path))
        for path in (tmp_path / "bitdance_jax").rglob("*")
        if path.is_file()
    }

    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        "dist",
        ".",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)

    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= names
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}
