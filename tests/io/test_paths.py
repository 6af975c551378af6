"""Paths that no library here can open are refused."""

import os

import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.io import paths


@pytest.mark.parametrize("name", ["a[b", "a*", os.fsdecode(b"\xff")])
def test_names_that_orbax_cannot_write(tmp_path, name):
    with pytest.raises(UserError, match=r"/a|UTF-8"):
        paths.check_checkpoint_path(tmp_path / name)


@pytest.mark.parametrize("name", [os.fsdecode(b"images/\xff"), "a\0b", "s3://bucket/x"])
def test_names_of_no_file(name):
    with pytest.raises(UserError):
        paths.expand(name)


def test_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    assert paths.expand("~/model") == "/home/user/model"


@pytest.mark.parametrize("path", ["thesis.txt", "png", "gs://bucket/x.png"])
def test_other_suffixes(path):
    with pytest.raises(UserError, match=rf"--out .*\.png.* {path}"):
        paths.check_suffix(path, ".png", "--out")
    paths.check_suffix("x.PNG", ".png", "--out")
