"""`bitdance tokenize`, as a user runs it."""

import sys

import numpy as np
import processes
import pytest
import tiny_models

from bitdance_jax.cli import tokenize
from bitdance_jax.data.tokens import TokensSource, check_tokens
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.errors import UserError
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.io.image_files import save_png
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.pipelines.tokenizer import Tokenizer


def test_a_folder_on_four_devices(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (200, 18, 20, 3), np.uint8)
    for number, image in enumerate(images):
        save_png(tmp_path / "images" / f"{number // 100}" / f"{number:03}.png", image)
    folder = tiny_models.save_tokenizer(tmp_path / "tokenizer")
    command = [
        "-m",
        "bitdance_jax.data.tokenize",
        "--tokenizer",
        str(folder),
        "--image-size",
        "16",
        "--flips",
        "--data.source",
        "folder",
        "--data.path",
        "images",
    ]
    command += ["--out", str(tmp_path / "tokens"), "--batch-size", "15"]
    out = processes.python(command, tmp_path, devices=4)
    assert (
        "tokens of 200 images, 200 of them written by this process now, " in out
        and "images/s on 4 devices" in out
    )
    source = TokensSource(tmp_path / "tokens")
    assert len(source) == 200 and source[199].keys() == {"codes", "codes_flipped", "label"}
    check_tokens(
        tmp_path / "tokens", tiny_models.TOKENIZER, tiny_models.tokenizer_params(), image_size=16
    )

    crops = np.stack([centre_crop(image, 16) for image in images])
    expected = np.packbits(
        Tokenizer(tiny_models.TOKENIZER, tiny_models.tokenizer_params()).encode(crops) > 0,
        axis=-1,
    )
    differing = np.unpackbits(np.stack([source[index]["codes"] for index in range(200)]) ^ expected)
    assert (
        differing.mean() < 1e-3
    )  # another split of the batch may round a value near 0 to the other side


def test_a_second_command_is_refused_and_leftovers_go(monkeypatch, tmp_path):
    folder = tmp_path / "tokens"
    flags = [
        "--tokenizer",
        str(tiny_models.save_tokenizer(tmp_path / "tokenizer")),
        "--image-size",
        "16",
        "--out",
        str(folder),
    ]
    monkeypatch.setattr(sys, "argv", ["tokenize", *flags])
    monkeypatch.setattr(
        tokenize.multihost, "initialize", lambda config: False
    )  # is before all other use of JAX
    monkeypatch.setattr(
        tokenize, "tokenize", lambda *arguments, **options: 0
    )  # has tests of its own
    with writer_lock(folder, is_folder=True):
        with pytest.raises(
            UserError,
            match=f"^another process is writing {folder}; wait for it, or give another folder$",
        ):
            tokenize.main()
        assert not list(folder.glob("*.json"))
        with replace_file(folder / "x") as leftover:
            leftover.touch()
        (folder / "x").rename(leftover)  # as a kill leaves it
    tokenize.main()
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--data.source", "folder"],
            "--data.source folder needs --data.path",
        ),
        (
            ["--data.source", "tokens", "--data.path", "x"],
            "--data.source must be images",
        ),
        (
            ["--data.path", "images"],
            "--data.path images needs --data.source too: folder, images, imagenet_tar, "
            "webdataset or tokens",
        ),
        (["--captioned.paths", "absent"], "no folder absent; name one with captioned images"),
        (
            ["--captioned.paths", "absent", "--flips"],
            "captioned images are not flipped and not cropped at random; leave out --flips",
        ),
        (
            ["--captioned.paths", "absent", "--captioned.weights", "0"],
            "--captioned.weights must not all be zero",
        ),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--crops", "-1"], "--crops must be between 0 and 1000, got -1"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(
        sys,
        "argv",
        ["tokenize", "--tokenizer", "absent", "--out", str(tmp_path / "tokens"), *flags],
    )
    with pytest.raises(UserError) as caught:
        tokenize.main()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "tokens").exists()
