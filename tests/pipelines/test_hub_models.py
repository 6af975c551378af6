"""Models by their Hugging Face id; the hub is a folder here, as in tests/convert/test_hub.py."""

import shutil
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import tiny_models

import bitdance_jax
from bitdance_jax import UserError
from bitdance_jax.convert.export import export
from bitdance_jax.io import paths
from bitdance_jax.pipelines import hub_models


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> list[str]:
    """The names that were fetched of the repository "owner/name", which holds a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITDANCE_CACHE", str(tmp_path / "cache"))
    tiny_models.save_model(tmp_path / "tiny", sampler={"head_steps": 3, "guidance_scale": 2.0})
    export(str(tmp_path / "tiny"), str(tmp_path / "hub" / "model.safetensors"))
    fetched: list[str] = []

    def snapshot(name, *, allow_patterns, local_files_only=False):
        if local_files_only or name != "owner/name":
            raise ConnectionError("no route to the hub\nCheck your connection")
        fetched.append(name)
        return str(tmp_path / "hub")

    def model_info(name, *, timeout):
        if name != "owner/name":
            raise ConnectionError("no route to the hub\nCheck your connection")
        return types.SimpleNamespace(
            siblings=[types.SimpleNamespace(rfilename="model.safetensors")]
        )

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return fetched


def test_converted_once(downloads, tmp_path, capsys):
    folder = tmp_path / "cache" / "models" / "owner--name"
    first = bitdance_jax.load("owner/name")
    assert str(folder) in capsys.readouterr().err
    second = bitdance_jax.load("owner/name")
    assert downloads == ["owner/name"] and capsys.readouterr().err == ""
    assert first.config == second.config == bitdance_jax.load(folder).config
    assert (first.name, first.sampler) == ("owner--name", tiny_models.SAMPLER)


def test_a_tokenizer(downloads):
    assert bitdance_jax.Tokenizer.load("owner/name").config == tiny_models.TOKENIZER
    assert downloads == ["owner/name"]


def test_nothing_else_is_left_in_the_cache(downloads, tmp_path):
    bitdance_jax.Tokenizer.load("owner/name")
    assert [file.name for file in (tmp_path / "cache" / "models").iterdir()] == ["owner--name"]


def test_an_incomplete_conversion_is_not_used(downloads, tmp_path):
    bitdance_jax.load("owner/name")
    (tmp_path / "cache" / "models" / "owner--name" / "config.json").unlink()
    shutil.rmtree(tmp_path / "cache" / "models" / "owner--name")
    bitdance_jax.load("owner/name")
    assert len(downloads) == 2


def test_offline_is_one_line(downloads):
    with pytest.raises(UserError, match="other/name") as caught:
        bitdance_jax.load("other/name")
    assert "\n" not in str(caught.value)
    assert not any((paths.user_cache() / "models").iterdir())


def test_an_empty_name():
    for load in (bitdance_jax.load, bitdance_jax.Tokenizer.load, bitdance_jax.TextToImage.load):
        with pytest.raises(UserError, match=r"^folder is empty; "):
            load("")


def test_a_folder_that_exists_wins(downloads, tmp_path):
    shutil.copytree(tmp_path / "tiny", tmp_path / "owner" / "name")
    bitdance_jax.load("owner/name")
    assert downloads == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", True),
        ("owner/name/file.pt", True),
        ("emoji", False),
        ("models/14b_64x", False),
        ("runs/emoji/model", False),
        ("mine/model", False),
        ("mine/tokenizer/model", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("owner/na me", False),
    ],
)
def test_names(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_models.is_hub_id(name) == expected


def test_the_cache(monkeypatch):
    monkeypatch.setenv("BITDANCE_CACHE", "/a")
    assert paths.user_cache() == Path("/a")
    monkeypatch.delenv("BITDANCE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert paths.user_cache() == Path("/b/bitdance_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert paths.user_cache() == Path("/c/.cache/bitdance_jax")


@pytest.mark.slow
def test_two_processes_convert_once(downloads, tmp_path):
    """The second waits at the lock, and finds the model then."""
    lock = hub_models.FileLock(tmp_path / "cache" / "models" / "owner--name.lock")
    (tmp_path / "cache" / "models").mkdir(parents=True)
    script = (
        "from bitdance_jax.pipelines.hub_models import local_folder; "
        "print('imported', flush=True); print(local_folder('owner/name'))"
    )
    with lock:
        command = [sys.executable, "-c", script]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        assert process.stdout.readline() == "imported\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=2)
        shutil.copytree(tmp_path / "tiny", tmp_path / "cache" / "models" / "owner--name")
    assert process.communicate(timeout=60)[0].strip().endswith("owner--name")
