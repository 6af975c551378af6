"""The sweep: its table, which it continues, its plot, its distance, and the name of its score."""

import dataclasses
import functools
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import tiny_models
from PIL import Image

from bitdance_jax.cli import sweep as sweep_command
from bitdance_jax.cli.command_line import run
from bitdance_jax.config import SamplerConfig, to_dict
from bitdance_jax.data.emoji import emoji_images
from bitdance_jax.evaluate import sampler_sweep as sweep
from bitdance_jax.fid.inception import Features
from bitdance_jax.io import image_files, plot
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.tokenizer.autoencoder import Autoencoder


OWN = "distance of the tokenizer's own features (not ImageNet FID)"
MODEL = dataclasses.replace(
    tiny_models.MODEL,
    transformer=dataclasses.replace(tiny_models.MODEL.transformer, num_layers=1),
    head=dataclasses.replace(tiny_models.MODEL.head, num_blocks=1),
)
SAMPLER = SamplerConfig(head_steps=2, guidance_scale=2.0)
load = functools.cache(ClassConditionalPipeline.load)
"""All commands share a model."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_models.save_model(root / "model", MODEL, sampler=to_dict(SAMPLER))
    tiny_models.save_tokenizer(root / "tokenizer")
    return root


@pytest.fixture
def command(folders, monkeypatch, capsys, tmp_path):
    """Runs the sweep in an empty folder; returns status, stdout and stderr. {models}: `folders`."""

    def command(*flags):
        flags = [str(flag).format(models=folders) for flag in flags]
        if "--checkpoint" not in flags:
            flags += ["--checkpoint", str(folders / "model")]
        monkeypatch.setattr(sys, "argv", ["sweep", *flags])
        status = run(sweep_command.main)
        return status, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.ClassConditionalPipeline, "load", load)
    return command


@pytest.fixture
def quick_scores(monkeypatch):
    """Replaces the score; returns a list of the samplers that were scored."""
    scored = []

    class Scorer:
        def __init__(self, arguments, model):
            pass

        def __call__(self, sampler):
            scored.append((sampler.guidance_scale, sampler.head_steps))
            return 10 * sampler.guidance_scale + 1 / sampler.head_steps

    monkeypatch.setattr(sweep, "Scorer", Scorer)
    return scored


def images_of(sampler, seed, count):
    """Replaces the generated images; each sampler and seed has others."""
    rng = np.random.default_rng((seed, sampler.head_steps, int(10 * sampler.guidance_scale)))
    return rng.integers(0, 256, (count, 16, 16, 3), np.uint8)


@pytest.fixture
def quick_images(monkeypatch):
    def batches(self, labels, seed, *, sampler, batch_size):
        images = images_of(sampler, seed, len(labels))
        return (images[row : row + batch_size] for row in range(0, len(labels), batch_size))

    monkeypatch.setattr(ClassConditionalPipeline, "batches", batches)


def frechet(a, b):
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)


def test_table_plot_and_console(command, quick_scores, tmp_path):
    flags = "--guidance 2.5,1,2.5 --head-steps 10,25 --num-images 50 --out new/s.csv"
    status, out, _ = command(*flags.split())
    assert status == 0
    assert quick_scores == [(2.5, 10), (1.0, 10), (2.5, 25), (1.0, 25)]
    lines = (tmp_path / "new" / "s.csv").read_text().splitlines()
    assert lines[0] == (
        "checkpoint,dtype,seed,num_images,solver,guidance_schedule,guidance_scale,head_steps,"
        "reference,score,value"
    )
    assert len(lines) == 5
    assert lines[1].endswith(f",float32,0,50,euler_maruyama,linear,2.5,10,emoji,{OWN},25.1")
    assert out.splitlines() == [
        f"guidance 2.5, 10 head steps: {OWN} 25.1",
        f"guidance 1, 10 head steps: {OWN} 10.1",
        f"guidance 2.5, 25 head steps: {OWN} 25.04",
        f"guidance 1, 25 head steps: {OWN} 10.04",
        f"lowest {OWN}: 10.04 with guidance 1 and 25 head steps",
        "table in new/s.csv, plot in new/s.png",
    ]
    with Image.open(tmp_path / "new" / "s.png") as image:
        assert image.width == 2 * plot.WIDTH


def test_rows_of_the_table_are_not_computed_again(command, quick_scores, tmp_path):
    command("--guidance", "1,2", "--head-steps", "10")
    before = (tmp_path / "sweep.csv").read_text()
    quick_scores.clear()
    assert command("--guidance", "1,2,3", "--head-steps", "10,25")[0] == 0
    assert quick_scores == [(3.0, 10), (1.0, 25), (2.0, 25), (3.0, 25)]
    assert (tmp_path / "sweep.csv").read_text().startswith(before)
    quick_scores.clear()
    status, out, _ = command("--guidance", "2", "--head-steps", "25")
    assert status == 0
    assert quick_scores == []
    assert out.splitlines()[0] == f"guidance 2, 25 head steps: {OWN} 20.04"
    for other in (
        ["--seed", "1"],
        ["--num-images", "70"],
        ["--dtype", "bfloat16"],
        ["--reference", "images"],
    ):
        quick_scores.clear()
        command("--guidance", "2", "--head-steps", "25", *other)
        assert quick_scores == [(2.0, 25)], other
    assert (tmp_path / "sweep.csv").read_text().count("\n") == 1 + 6 + 4


def test_an_interrupted_sweep_keeps_its_rows(command, monkeypatch, tmp_path):
    def stop(self, sampler):
        if sampler.guidance_scale == 3:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(sweep.Scorer, "__init__", lambda self, *arguments: None)
    monkeypatch.setattr(sweep.Scorer, "__call__", stop)
    status, _, error = command("--guidance", "1,2,3,4")
    assert status == 130
    assert error.startswith("stopped; ")
    assert (tmp_path / "sweep.csv").read_text().count("\n") == 3


def test_without_lists_the_saved_sampler_is_scored(command, quick_scores):
    assert command()[0] == 0
    assert quick_scores == [(2.0, 2)]


def test_the_default_score_is_the_distance_of_encoder_features(
    command, quick_images, few_emoji, tmp_path
):
    status, out, error = command(
        "--guidance", "2", "--num-images", "70", "--seed", "4", "--batch-size", "32"
    )
    assert status == 0

    def features(images):
        parameters = {"params": tiny_models.tokenizer_params()}
        z = np.asarray(
            Autoencoder(tiny_models.TOKENIZER).apply(
                parameters, jnp.asarray(image_files.to_model(images)), method="encode"
            )
        )
        return np.concatenate([z.mean((1, 2)), z.std((1, 2))], axis=-1).astype(np.float64)

    real = features(emoji_images("train", 16))
    expected = frechet(features(images_of(SAMPLER, 4, 70)), real)
    value = float((tmp_path / "sweep.csv").read_text().strip().rpartition(",")[2])
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert f"the score is the {OWN}" in error
    assert out.count("FID") == out.count("not ImageNet FID") == 2


def test_with_inception_it_is_fid_against_the_reference(
    command, quick_images, monkeypatch, tmp_path
):
    """A small network replaces Inception-v3, which has tests of its own."""

    def network(params, images):
        return Features(params * images[:, :2, :2].astype(jnp.float32).reshape(len(images), -1))

    monkeypatch.setattr(
        sweep.inception_weights,
        "load",
        lambda path: jnp.float32(0.5) if path == "inception.pth" else None,
    )
    monkeypatch.setattr(sweep.inception, "features", network)
    (tmp_path / "real").mkdir()
    real = np.random.default_rng(9).integers(0, 256, (30, 16, 16, 3), np.uint8)
    for number, image in enumerate(real):
        image_files.save_png(tmp_path / "real" / f"{number:02}.png", image)
    flags = "--guidance 2,3 --num-images 40 --inception inception.pth --reference real"
    status, out, error = command(*flags.split())
    assert status == 0
    corner = [
        0.5 * x[:, :2, :2].reshape(len(x), -1).astype(np.float64)
        for x in (real, *(images_of(s, 0, 40) for s in guided(2, 3)))
    ]
    values = [
        float(line.rpartition(",")[2])
        for line in (tmp_path / "sweep.csv").read_text().splitlines()[1:]
    ]
    np.testing.assert_allclose(values, [frechet(x, corner[0]) for x in corner[1:]], rtol=1e-6)
    assert out.startswith(f"guidance 2, 2 head steps: FID {values[0]:.4g}\n")
    assert "not ImageNet" not in out
    assert "warning: the covariance of 40 images in 2048 dimensions is singular" in error


def guided(*scales):
    return [dataclasses.replace(SAMPLER, guidance_scale=float(scale)) for scale in scales]


@pytest.mark.slow
def test_generated_images_depend_on_the_sampler(command, tmp_path):
    status, out, _ = command("--head-steps", "1,2", "--num-images", "30", "--batch-size", "8")
    assert status == 0, out
    values = [
        float(line.rpartition(",")[2])
        for line in (tmp_path / "sweep.csv").read_text().splitlines()[1:]
    ]
    assert len(values) == 2
    assert 0 < values[0] != values[1] > 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ["--guidance", "2,x"],
            "--guidance",
        ),
        (
            ["--guidance", "nan"],
            "--guidance",
        ),
        (
            ["--guidance", ""],
            "--guidance",
        ),
        (
            ["--head-steps", "10;25"],
            "--head-steps",
        ),
        (
            ["--head-steps", "2.5"],
            "--head-steps",
        ),
        (["--head-steps", "10,0"], "--head-steps"),
        (["--guidance", "1,-1"], "guidance"),
        (["--num-images", "1"], "--num-images"),
        (["--out", "sweep.txt"], "--out"),
        (
            ["--inception", "x.pth"],
            "--reference",
        ),
        (
            ["--checkpoint", "{models}/tokenizer"],
            "tokenizer",
        ),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--reference", "nowhere"], "nowhere"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "10000000"], "--batch-size"),
        (
            ["--num-images", "1000000000000000000"],
            "--num-images",
        ),
        (
            ["--head-steps", "10,1000000000000"],
            "--head-steps",
        ),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, flags, named):
    status, out, error = command(*flags)
    assert (status, out) == (2, "")
    line = error.splitlines()[-1]
    assert line.startswith("error: ")
    assert named in line
    assert list(tmp_path.iterdir()) == []


def test_a_second_sweep_into_the_same_table_is_refused(command, tmp_path):
    with writer_lock(tmp_path / "sweep.csv", is_folder=False):
        status, out, error = command("--checkpoint", "nowhere")
    assert (status, out) == (2, "")
    assert "another process is writing sweep.csv" in error


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "notes", "\0", '"' + "a" * 200_000])
def test_another_table_is_refused(command, tmp_path, text):
    (tmp_path / "sweep.csv").write_text(text)
    status, _, error = command()
    assert status == 2
    assert "sweep.csv exists and is not the table of a sweep" in error
    assert (tmp_path / "sweep.csv").read_text() == text
