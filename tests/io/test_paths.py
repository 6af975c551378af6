"""Paths that no library here can open are refused."""

import os

import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.io import paths


@pytest.mark.parametrize("name", ["a[b", "a*", os.fsdecode(b"\xff")])
def test_names_that_orbax_cannot_write(tmp_path, name):
    with pytest.raises(UserError, match=r"/a|UTF-8"):
        paths.check_checkpoint_path(tmp_path / name)


@pytest.mark.parametrize(
    "name", [os.fsdecode(b"images/\xff"), "a\0b", "s3://bucket/x", "x/" + 128 * "é" + "/y"]
)
def test_names_of_no_file(name):
    with pytest.raises(UserError):
        paths.expand(name)


def test_the_longest_name(tmp_path):
    name = 255 * "a"
    paths.local(tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"has 256 bytes.* may have 255") as caught:
        paths.local(tmp_path / f"{name}a")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_made_folders_that_stay_empty_are_removed(tmp_path):
    with paths.folder_made(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not any(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with paths.folder_made(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["file"]
    with paths.folder_made(tmp_path / "a"):
        pass
    assert (tmp_path / "a").is_dir()


def test_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    assert paths.expand("~/model") == "/home/user/model"


@pytest.mark.parametrize("path", ["thesis.txt", "png", "gs://bucket/x.png"])
def test_other_suffixes(path):
    with pytest.raises(UserError, match=rf"--out .*\.png.* {path}"):
        paths.check_suffix(path, ".png", "--out")
    paths.check_suffix("x.PNG", ".png", "--out")
