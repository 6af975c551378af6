"""python -m bitdance_jax.data.tokenize, as a user runs it."""

import subprocess
import sys

import pytest
import tiny_models

from bitdance_jax.data import tokenize
from bitdance_jax.data.tokens import TokensSource, check_tokens
from bitdance_jax.errors import UserError


def test_the_emoji(tmp_path):
    folder = tiny_models.save_tokenizer(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "bitdance_jax.data.tokenize", "--tokenizer", str(folder), "--image-size", "16", "--flips"]
    command += ["--out", str(tmp_path / "tokens")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "tokens of 1,906 pictures, 1,906 of them made by this process now, " in done.stdout and "images/s on 1 devices" in done.stdout
    source = TokensSource(tmp_path / "tokens")
    assert len(source) == 1906 and source[1905].keys() == {"codes", "codes_flipped", "label"}
    check_tokens(tmp_path / "tokens", tiny_models.TOKENIZER, tiny_models.tokenizer_params(), 16)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data.source", "folder"], "data.source folder needs --data.path, a folder with one sub-folder a class"),
        (["--data.source", "tokens", "--data.path", "x"], "data.source tokens is tokens already; give the pictures"),
        (["--data.path", "pictures"], "--data.path pictures needs --data.source too: folder, imagenet_tar or tokens"),
        (["--batch-size", "0"], "batch_size must be positive, got 0"),
        (["--crops", "2", "--flips"], "leave out --flips or --crops"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(sys, "argv", ["tokenize", "--tokenizer", "absent", "--out", str(tmp_path / "tokens"), *flags])
    with pytest.raises(UserError) as caught:
        tokenize.main()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "tokens").exists()
