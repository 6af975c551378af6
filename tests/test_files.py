"""One process at a time writes into a folder, and what killed ones left there goes."""

import subprocess
import sys

import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.files import only_writer, remove_leftovers, replacing


def test_another_writer_is_refused_and_a_killed_ones_leftovers_go(tmp_path):
    with only_writer(tmp_path):
        with pytest.raises(UserError, match=f"^another process is writing into {tmp_path}; wait for it, or give another folder$"):
            with only_writer(tmp_path):
                pass
    kept = [tmp_path / "deep" / "x.png", tmp_path / ".hidden"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    script = f"""
import os
from bitdance_jax.files import only_writer, replacing
with only_writer({str(tmp_path)!r}), replacing({str(tmp_path / "deep" / "y.png")!r}) as temporary:
    temporary.touch()
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
    with only_writer(tmp_path):
        remove_leftovers(tmp_path)
        with replacing(tmp_path / "z.png") as temporary:
            temporary.touch()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*kept, tmp_path / "z.png"}
