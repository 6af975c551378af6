"""Paths that are not model folders, and the command that the error message recommends."""

import pytest

from bitdance_jax.errors import FileError
from bitdance_jax.io import model_folder
from bitdance_jax.io.model_folder_hints import hint


CONVERT = "bitdance convert"


@pytest.fixture
def make_files(tmp_path, monkeypatch):
    """Makes empty files in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def make(*files):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("{}" if file.endswith(".json") else "")

    return make


@pytest.mark.parametrize(
    ("files", "given", "command"),
    [
        (
            ["BitDance_B_1x.pt"],
            "BitDance_B_1x.pt",
            f"{CONVERT} BitDance_B_1x.pt models/BitDance_B_1x",
        ),
        (
            ["ae_d16c32.safetensors"],
            "ae_d16c32.safetensors",
            f"{CONVERT} ae_d16c32.safetensors models/ae_d16c32",
        ),
        (
            ["r/BitDance-14B/model-00001-of-00002.safetensors", "r/BitDance-14B/config.json"],
            "r/BitDance-14B",
            None,
        ),
        (["Diffusers/model_index.json", "Diffusers/text_encoder/config.json"], "Diffusers", None),
        (["Diffusers/transformer/diffusion_pytorch_model.safetensors"], "Diffusers", None),
        ([], "models/b_1x", f"{CONVERT} RELEASED models/b_1x"),
        ([], "b_1x", f"{CONVERT} RELEASED b_1x"),
    ],
)
def test_unconverted_models(make_files, files, given, command):
    make_files(*files)
    with pytest.raises(FileError) as caught:
        model_folder.read_config(given)
    message = str(caught.value)
    assert "\n" not in message and message.count(given) >= 2
    assert message.endswith(command or f"{CONVERT} {given} models/{given.rpartition('/')[2]}")


def test_a_folder_of_model_folders(make_files):
    make_files(
        "models/b_1x/config.json",
        "models/b_1x/weights/d",
        "models/b_4x/config.json",
        "models/b_4x/weights/d",
    )
    with pytest.raises(FileError, match=r"models/b_1x, models/b_4x$"):
        model_folder.read_config("models")


@pytest.mark.parametrize("given", ["runs/x", "runs/x/model", "elsewhere/model"])
def test_a_run_that_was_not_started(make_files, given):
    run = given.removesuffix("/model")
    with pytest.raises(FileError, match=rf"{given}; .* CONFIG --run\.workdir {run}$"):
        model_folder.read_config(given)


def test_the_model_of_an_unfinished_run(make_files):
    make_files("runs/x/model.json")
    with pytest.raises(FileError, match=r"runs/x/model; .* give runs/x "):
        model_folder.read_config("runs/x/model")


def test_another_file(make_files):
    make_files("notes.txt")
    with pytest.raises(FileError, match=r"^notes\.txt "):
        model_folder.read_config("notes.txt")


def test_an_adapter(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    assert hint(tmp_path) == (
        f"it is a LoRA adapter: give its base model as the model, and {tmp_path} as lora"
    )
