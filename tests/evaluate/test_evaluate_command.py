"""`bitdance evaluate`: scores of samples and of a tokenizer, and one line for bad input."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
from golden_models import read
from inception_weights import state_dict
from PIL import Image

from bitdance_jax.cli import evaluate as command
from bitdance_jax.cli.command_line import run
from bitdance_jax.data.emoji import EmojiSource, emoji_images
from bitdance_jax.data.transforms import centre_crop
from bitdance_jax.evaluate import metrics
from bitdance_jax.fid import inception, inception_weights
from bitdance_jax.fid.inception import Features
from bitdance_jax.fid.statistics import gaussian
from bitdance_jax.io import image_files


SOURCE = EmojiSource()
EMOJI = np.stack([centre_crop(SOURCE[31 * n]["image"], 64) for n in range(100)])


def evaluate(monkeypatch, capsys, *arguments):
    """Exit status, standard output, and standard error without progress bars."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    status = run(command.main)
    out, err = capsys.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    errors = [line for line in lines if line.strip() and "it/s]" not in line]
    return status, out, "\n".join(errors)


def parse_scores(out):
    rows = (line.split(": ") for line in out.splitlines() if ": " in line)
    return {name: float(value) for name, value in rows}


@pytest.fixture
def toy_network(monkeypatch):
    """Replaces Inception by a network of six features without weights."""

    def features(params, images):
        x = images.astype(jnp.float32) / 255
        return Features(
            jnp.concatenate([x.mean((1, 2)), x.std((1, 2))], axis=1),
            x[:, 30, 34],
            20 * x[:, ::16, ::16, 0].reshape(len(x), -1),
        )

    monkeypatch.setattr(inception, "features", features)
    monkeypatch.setattr(inception_weights, "load", lambda path: {})


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "samples.npz", EMOJI[:60])
    np.savez(tmp_path / "reference.npz", arr_0=EMOJI[40:])
    for i, image in enumerate(EMOJI[40:]):
        image_files.save_png(tmp_path / "folder" / f"{i:03}.png", image)
    (tmp_path / "w.pth").touch()
    (tmp_path / "f.png").mkdir()
    return tmp_path


@pytest.mark.parametrize("reference", ["reference.npz", "folder"])
def test_samples(monkeypatch, capsys, toy_network, files, reference):
    arguments = (files / "samples.npz", "--reference", files / reference, "--inception", "w")
    status, out, err = evaluate(monkeypatch, capsys, *arguments, "--batch-size", 16)
    assert status == 0
    scores = parse_scores(out)
    assert list(scores) == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert scores["FID"] > 0
    assert scores["sFID"] > 0
    assert 0 < scores["Precision"] < 1
    assert 0 < scores["Recall"] < 1
    assert "warning: the covariance of 60 samples in 2048 dimensions is singular" in err
    assert "warning: the covariance of 60 reference images" in err


def test_samples_against_themselves(monkeypatch, capsys, toy_network, files):
    samples = files / "samples.npz"
    arguments = (samples, "--reference", samples, "--inception", "w")
    status, out, _ = evaluate(monkeypatch, capsys, *arguments)
    assert status == 0
    scores = parse_scores(out)
    assert scores.pop("Inception Score") > 1
    assert scores == {"FID": 0, "sFID": 0, "Precision": 1, "Recall": 1}


def test_a_warning_of_samples_sorted_by_class(capsys):
    """Two splits of one class each: the warning has the score of ADM's suite."""
    for labels, warned in ((np.arange(10_000) // 5000, True), (np.arange(10_000) % 2, False)):
        samples = metrics.FeatureSet(
            gaussian(np.random.default_rng(0).normal(size=(9, 3))), logits=20 * np.eye(2)[labels]
        )
        scores = metrics.score(samples, samples)
        assert scores.inception_score == pytest.approx(2, rel=1e-2)
        command._warn_of_order(samples, scores)
        assert ("an Inception Score of 1.0000" in capsys.readouterr().err) == warned


@pytest.mark.slow
def test_samples_through_inception(monkeypatch, capsys, tmp_path):
    safetensors.numpy.save_file(state_dict(), tmp_path / "w.safetensors")
    recorded = read("evaluation/inception")
    np.savez(tmp_path / "samples.npz", recorded["64.image"].transpose(0, 2, 3, 1))
    np.savez(
        tmp_path / "reference.npz",
        mu=np.zeros(inception.POOLED),
        sigma=np.zeros((inception.POOLED, inception.POOLED)),
    )
    arguments = ("--reference", tmp_path / "reference.npz", "--inception")
    status, out, err = evaluate(
        monkeypatch, capsys, tmp_path / "samples.npz", *arguments, tmp_path / "w.safetensors"
    )
    pooled = recorded["64.features_2048"].astype(np.float64)
    assert status == 0
    assert list(parse_scores(out)) == ["Inception Score", "FID"]
    assert parse_scores(out)["FID"] == pytest.approx(
        np.sum(pooled.mean(axis=0) ** 2) + pooled.var(axis=0, ddof=1).sum(), rel=1e-4
    )
    assert "has no arr_0: precision and recall cannot be computed" in err
    assert "has no mu_s and sigma_s" in err


@pytest.mark.parametrize("kind", ["tokenizer", "model"])
def test_reconstruction(monkeypatch, capsys, toy_network, tmp_path, kind):
    """A tokenizer takes images of any size, a class-conditional model those of its size, 16."""
    monkeypatch.setattr(command, "emoji_images", lambda *options: emoji_images(*options)[:30])
    save = tiny_models.save_tokenizer if kind == "tokenizer" else tiny_models.save_model
    model, pairs = save(tmp_path / "model"), tmp_path / "pairs.png"
    flags = ["--inception", "w", "--out", pairs, "--show", 5, "--batch-size", 15]
    status, out, err = evaluate(monkeypatch, capsys, "--reconstruction", model, "emoji", *flags)
    assert status == 0
    assert list(parse_scores(out)) == ["PSNR", "SSIM", "rFID"]
    assert "warning: the covariance of 30 images" in err
    assert "originals beside reconstructions of 5 images" in out
    side = 128 + 4 if kind == "tokenizer" else 8 * 16 + 4
    with Image.open(tmp_path / "pairs.png") as image:
        assert image.size == (8 * side, 2 * side)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["samples.npz"], "--reference"),
        (
            ["samples.npz", "--reference", "reference.npz"],
            "--inception",
        ),
        (
            ["samples.npz", "--reference", "reference.npz", "--inception", "no.pth"],
            "no.pth",
        ),
        (["no.npz", "--reference", "reference.npz", "--inception", "w.pth"], "no.npz"),
        (
            ["samples.npz", "--reference", "no.npz", "--inception", "w.pth"],
            "no.npz",
        ),
        (
            ["samples.npz", "--reference", "reference.npz", "--inception", "w.pth"],
            "w.pth",
        ),
        (
            ["samples.npz", "--image-size", "32", "--reference", "folder", "--inception", "w.pth"],
            "samples.npz must be 32 x 32",
        ),
        (
            ["samples.npz", "--reference", "folder", "--inception", "w.pth", "--out", "x.png"],
            "--out",
        ),
        (["samples.npz", "--batch-size", "0"], "--batch-size"),
        (
            ["samples.npz", "--batch-size", "10000000"],
            "--batch-size",
        ),
        (
            ["samples.npz", "--show", "1000000000"],
            "--show",
        ),
        (
            ["samples.npz", "--image-size", "1000000000"],
            "--image-size",
        ),
        (
            ["samples.npz", "--referense", "x"],
            "--reference?",
        ),
        (["emoji", "--reconstruction", "nowhere"], "nowhere"),
        (
            ["emoji", "--reconstruction", "nowhere", "--out", "f.png"],
            "f.png",
        ),
        (
            ["emoji", "--reconstruction", "nowhere", "--out", "a.txt"],
            "--out",
        ),
        (
            ["emoji", "--reconstruction", "nowhere", "--reference", "folder"],
            "--reference",
        ),
        ([], "images"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, files, arguments, named):
    monkeypatch.chdir(files)
    status, out, err = evaluate(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert named in err
