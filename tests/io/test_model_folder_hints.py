"""What a user gives in place of a model folder, and the command that is named then."""

import pytest

from bitdance_jax.errors import UserError
from bitdance_jax.io import model_folder


CONVERT = "python -m bitdance_jax.convert"


@pytest.fixture
def place(tmp_path, monkeypatch):
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
        (
            [],
            "shallowdream/BitDance-14B-64x",
            f"{CONVERT} shallowdream/BitDance-14B-64x models/BitDance-14B-64x",
        ),
        ([], "models/b_1x", f"{CONVERT} RELEASED models/b_1x"),
        ([], "b_1x", f"{CONVERT} RELEASED b_1x"),
    ],
)
def test_what_is_not_converted_names_the_command(place, files, given, command):
    place(*files)
    with pytest.raises(UserError) as caught:
        model_folder.read_config(given)
    message = str(caught.value)
    assert "\n" not in message and message.count(given) >= 2
    assert message.endswith(command or f"{CONVERT} {given} models/{given.rpartition('/')[2]}")


def test_a_folder_of_model_folders_lists_them(place):
    place(
        "models/b_1x/config.json",
        "models/b_1x/weights/d",
        "models/b_4x/config.json",
        "models/b_4x/weights/d",
    )
    with pytest.raises(UserError, match=r"the model folders in it are: models/b_1x, models/b_4x$"):
        model_folder.read_config("models")


@pytest.mark.parametrize("given", ["runs/x", "runs/x/model", "elsewhere/model"])
def test_a_run_that_was_not_started(place, given):
    run = given.removesuffix("/model")
    with pytest.raises(
        UserError,
        match=rf"^no model folder {given}; a run writes it: python train\.py CONFIG --run\.workdir {run}$",
    ):
        model_folder.read_config(given)


def test_the_model_of_a_run_that_is_not_finished(place):
    place("runs/x/model.json")
    with pytest.raises(
        UserError,
        match=r"^no model folder runs/x/model; the run runs/x is not finished; give runs/x for its newest",
    ):
        model_folder.read_config("runs/x/model")


def test_any_other_file(place):
    place("notes.txt")
    with pytest.raises(
        UserError, match=r"^notes\.txt is not a model folder but a file; a model is a folder$"
    ):
        model_folder.read_config("notes.txt")
