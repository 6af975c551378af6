"""`bitdance sample`: images in a file, errors as one line, and from training to images."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from PIL import Image
from processes import python, start_job

from bitdance_jax.cli import sample as sample_command
from bitdance_jax.cli.command_line import run
from bitdance_jax.config import SamplerConfig, to_dict
from bitdance_jax.data.emoji import EXAMPLES
from bitdance_jax.io import image_files
from bitdance_jax.pipelines import memory, toy_text_to_image
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.pipelines.text_to_image import TextToImage
from bitdance_jax.pipelines.weighted import Weighted


ROOT = Path(__file__).parents[2]
CLASSES = [
    "Activities",
    "Animals",
    "Flags",
    "Food",
    "Objects",
    "People",
    "Smileys",
    "Symbols",
    "Travel",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_models.save_model(
        root / "model", class_names=CLASSES, sampler=to_dict(tiny_models.SAMPLER)
    )
    tiny_models.save_tokenizer(root / "tokenizer")
    toy_text_to_image.save(root / "prompts", toy_text_to_image.config())
    for name, source in (("damaged", "model"), ("truncated", "prompts")):
        shutil.copytree(root / source, root / name)
        largest = max(
            (path for path in (root / name / "weights").rglob("*") if path.is_file()),
            key=lambda path: path.stat().st_size,
        )
        largest.write_bytes(largest.read_bytes()[:-1])
    return root


@pytest.fixture
def command():
    """The command, to be run in this process."""
    return sample_command


@pytest.fixture
def sample(command, folders, monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder: exit status, stdout, stderr.

    {models} in a flag is the folder of models. Without --checkpoint the model is the
    class-conditional one there, and with `embedded` it is the command's default.
    """

    def sample(*flags, embedded=False):
        flags = [str(flag).format(models=folders) for flag in flags]
        if "--checkpoint" not in flags and not embedded:
            flags += ["--checkpoint", os.path.relpath(folders / "model")]
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
        status = run(command.main)
        return status, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return sample


@pytest.fixture
def quick_samples(monkeypatch):
    """Grey images instead of generated ones; a list of what each call to `sample` got."""
    calls = []

    def sample(self, labels, seed=0, **options):
        calls.append({"labels": labels, "seed": seed, **options})
        return np.full((len(labels), 16, 16, 3), 128, np.uint8)

    monkeypatch.setattr(ClassConditionalPipeline, "sample", sample)
    return calls


def test_a_grid(sample, tmp_path):
    status, out, _ = sample("--labels", "Flags", "3", "--per-label", "2", "--out", "new/x.png")
    assert status == 0
    assert out == "4 images of 2 labels in new/x.png\n"
    with Image.open(tmp_path / "new" / "x.png") as image:
        pixels = np.asarray(image)
        text = image.text
    # Images of 16 pixels, enlarged 8 times, each in a margin of 2; the captions stand to the left.
    assert pixels.shape[0] == 2 * 132 and 2 * 132 + 20 < pixels.shape[1] < 2 * 132 + 120
    cells = [
        pixels[row * 132 + 2 : row * 132 + 130, -(2 - column) * 132 + 2 :][:, :128]
        for row in range(2)
        for column in range(2)
    ]
    assert all(cell.std() > 10 for cell in cells)
    assert text["seed"] == "0" and text["head_steps"] == "3" and "label" not in text
    assert len({cell.tobytes() for cell in cells}) == 4


def test_generated_images_are_counted(sample, quick_samples, command, monkeypatch):
    assert sample("--labels", "3", "--per-label", "1")[:2] == (
        0,
        "1 image of 1 label in samples.png\n",
    )
    monkeypatch.setattr(command, "sample_to_npz", lambda *_, **__: 0)
    assert (
        sample("--npz", "x.npz", "--num-images", "4")[1]
        == "4 images of 4 labels in x.npz (0 generated now)\n"
    )
    assert (
        sample("--npz", "x.npz", "--num-images", "10")[1]
        == "10 images of 9 labels in x.npz (0 generated now)\n"
    )


def test_by_default_every_class_as_the_model_was_saved(sample, quick_samples, tmp_path):
    status, out, _ = sample()
    assert (status, out) == (0, "72 images of 9 labels in samples.png\n")
    labels = [label for label in range(9) for _ in range(8)]
    assert quick_samples == [
        {
            "labels": labels,
            "seed": 0,
            "sampler": tiny_models.SAMPLER,
            "given": None,
            "batch_size": 24,
        }
    ]
    assert os.listdir(tmp_path) == ["samples.png"]


def test_a_model_of_the_hub(sample, quick_samples, command, folders, monkeypatch):
    monkeypatch.setattr(command, "local_folder", {"owner/name": str(folders / "model")}.get)
    status, out, _ = sample("--checkpoint", "owner/name", "--labels", "3")
    assert (status, out) == (0, "8 images of 1 label in samples.png\n")


def test_flags_reach_the_sampler(sample, quick_samples):
    flags = "--head-steps 7 --guidance-scale 3 --guidance-schedule constant --solver euler "
    flags += "--seed 5 --batch-size 2 --labels 8 --per-label 2"
    assert sample(*flags.split())[0] == 0
    expected = SamplerConfig(
        head_steps=7, solver="euler", guidance_scale=3.0, guidance_schedule="constant"
    )
    (call,) = quick_samples
    assert (call["labels"], call["seed"], call["batch_size"]) == ([8, 8], 5, 2)
    assert call["sampler"] == expected


def test_a_named_sampler(sample, quick_samples):
    """It changes the model's solver, and other flags change it."""
    flags = ["--labels", "8", "--sampler", "fast"]
    assert sample(*flags)[0] == 0
    assert sample(*flags, "--head-steps", "7")[0] == 0
    fast = tiny_models.SAMPLER.named("fast")
    assert [call["sampler"] for call in quick_samples] == [
        fast,
        dataclasses.replace(fast, head_steps=7),
    ]


@pytest.fixture
def quick_prompts(monkeypatch):
    """Grey images instead of generated ones; a list of what each call to `sample` got."""
    calls = []

    def sample(self, prompt, *, size, images_per_input, **options):
        calls.append(
            {
                "prompt": prompt,
                "size": size,
                "images_per_input": images_per_input,
                "mesh": self.mesh.devices.shape,
                **options,
            }
        )
        return np.full((len(prompt) * images_per_input, 32, 64, 3), 128, np.uint8)

    monkeypatch.setattr(TextToImage, "sample", sample)
    return calls


def test_prompts(sample, quick_prompts, tmp_path):
    """One image as it is, several as a grid: a row a prompt, or about as many rows as columns."""
    at = ["--checkpoint", "{models}/prompts", "--out", "x.png"]
    assert sample(*at, "--prompt", "a cat")[:2] == (0, "1 image of 64x32 in x.png\n")
    with Image.open("x.png") as image:
        assert image.size == (64, 32)
        expected = {"prompt": "a cat", "seed": "0", "index": "0", "model": "prompts"}
        assert expected.items() <= image.text.items()
    sampler = toy_text_to_image.SAMPLER
    expected = {
        "prompt": ("a cat",),
        "size": "1024x1024",
        "images_per_input": 1,
        "mesh": (1, 1, 1),
        "seed": 0,
        "negative_prompt": None,
        "given": None,
        "batch_size": 4,
        "progress": True,
    }
    assert quick_prompts == [expected | {"sampler": sampler}]

    flags = "--size 64x32 --per-prompt 3 --seed 5 --head-steps 9 --guidance-scale 1 "
    flags += "--batch-size 2 --mesh.data -1 --mesh.tensor 1"
    assert sample(*at, "--prompt", "a cat", "一只狗", *flags.split())[:2] == (
        0,
        "6 images of 64x32 in x.png\n",
    )
    with Image.open("x.png") as image:
        assert image.size == (3 * 68, 2 * 36)
    sampler = SamplerConfig(head_steps=9, guidance_scale=1.0, guidance_schedule="constant")
    assert quick_prompts[1] == expected | {
        "prompt": ("a cat", "一只狗"),
        "size": "64x32",
        "images_per_input": 3,
        "seed": 5,
        "batch_size": 2,
        "sampler": sampler,
    }
    sample(*at, "--prompt", *"abcde")
    with Image.open("x.png") as image:
        assert image.size == (3 * 68, 2 * 36)


def test_negative_and_weighted_prompts(sample, quick_prompts, tmp_path):
    flags = "--checkpoint {models}/prompts --prompt cat snow --prompt-weights 1 0.5 --size 64x32 "
    flags += "--negative-prompt text --guidance-patch-end 0.5"
    assert sample(*flags.split())[:2] == (0, "1 image of 64x32 in samples.png\n")
    (call,) = quick_prompts
    assert call["prompt"] == [Weighted(("cat", "snow"), (1.0, 0.5))]
    with Image.open("samples.png") as image:
        expected = {"prompt": "cat (1), snow (0.5)", "negative_prompt": "text"}
        assert (expected | {"guidance_patch_end": "0.5"}).items() <= image.text.items()


def test_the_embedded_model_has_default_prompts(sample, quick_prompts, tmp_path):
    """A row for each, with its title, also of one image."""
    assert sample(embedded=True)[:2] == (0, "32 images of 64x32 in samples.png\n")
    assert sample("--per-prompt", "1", embedded=True)[0] == 0
    for call, each in zip(quick_prompts, (4, 1), strict=True):
        expected = {"prompt": EXAMPLES, "size": "128x128", "images_per_input": each}
        assert (expected | {"batch_size": 32}).items() <= call.items()
    with Image.open("samples.png") as image:
        assert image.height == len(EXAMPLES) * 36 and image.width > 68 + 100
    assert sample("--prompt", "a cat", "a dog", embedded=True)[0] == 0
    assert (quick_prompts[2]["prompt"], quick_prompts[2]["images_per_input"]) == (
        ("a cat", "a dog"),
        1,
    )


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"prompt": ("a cat",), "per_prompt": 2}, "emoji"),
        ({"labels": ("Flags",)}, "emoji_classes"),
        ({"per_label": 2}, "emoji_classes"),
        ({"npz": "x.npz"}, "emoji_classes"),
    ],
)
def test_the_embedded_model_of_other_flags(flags, name):
    assert sample_command.embedded(sample_command.Arguments(**flags)) == name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--labels Flags --prompt x",
            "emoji_classes is a class-conditional model; --prompt is for text-to-image models such"
            " as emoji, the default without --labels",
        ),
        (
            "--npz x.npz --prompt x --size 64x64",
            "emoji_classes is a class-conditional model; --prompt, --size is for text-to-image"
            " models such as emoji, the default without --npz",
        ),
        (
            "--checkpoint emoji --labels Flags",
            "emoji is a text-to-image model; --labels is for class-conditional models such as"
            " emoji_classes",
        ),
        ("--complete x.png", "--prompt is missing; emoji is a text-to-image model"),
        ("--prompt x --size 256x256", "up to 128 pixels, got 256x256"),
    ],
)
def test_bad_input_for_the_embedded_models_is_one_line(sample, tmp_path, flags, message):
    status, out, error = sample(*flags.split(), embedded=True)
    assert (status, out) == (2, "") and error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_completed_images(sample, quick_prompts, tmp_path):
    """The PNG says what was kept; images of prompts have the size of the completed one."""
    Image.new("RGB", (16, 16), "red").save("small.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 8, 16, 16))
    mask.save("mask.png")
    flags = "--labels 3 --per-label 2 --complete small.png --mask mask.png --keep-patches 6 --paste"
    assert sample(*flags.split())[0] == 0
    with Image.open("samples.png") as image:
        expected = {"completed": "small.png", "mask": "mask.png", "kept_patches": "0-5"}
        assert (expected | {"pasted": "True"}).items() <= image.text.items()

    Image.new("RGB", (64, 32), "red").save("wide.png")
    flags = "--checkpoint {models}/prompts --prompt cat --complete wide.png --keep-patches 1"
    assert sample(*flags.split())[0] == 0
    flags = "--checkpoint {models}/prompts --prompt cat --complete wide.png --at 32 0 --size 64x64"
    assert sample(*flags.split())[0] == 0
    assert [call["size"] for call in quick_prompts] == ["64x32", "64x64"]
    assert [call["given"].at for call in quick_prompts] == [None, (32, 0)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--negative-prompt", "x"],
            "is a class-conditional model; --negative-prompt is for text-to-image models",
        ),
        (
            ["--checkpoint", "{models}/prompts", "--prompt", "x", "--prompt-weights", "1", "2"],
            "weighted prompts need one weight each: 1 of them, got 2 weights",
        ),
        (["--mask", "x.png"], "--mask needs --complete IMAGE"),
        (["--keep-patches", "3"], "--keep-patches needs --complete IMAGE"),
        (["--paste"], "--paste needs --complete IMAGE"),
        (["--npz", "x.npz", "--complete", "x.png"], "--complete is for a grid; omit --npz"),
        (["--complete", "x.png"], "cannot read the image x.png"),
        (
            ["--checkpoint", "{models}/prompts", "--labels", "3"],
            "is a text-to-image model; --labels is for class-conditional models",
        ),
        (
            ["--checkpoint", "{models}/prompts"],
            "--prompt is missing",
        ),
        (
            ["--prompt", "x", "--mesh.data", "2"],
            "is a class-conditional model; --prompt, --mesh is for text-to-image models",
        ),
        (
            ["--checkpoint", "{models}/prompts", "--prompt", "x", "--size", "64"],
            "--size must be WIDTHxHEIGHT",
        ),
        (
            ["--checkpoint", "{models}/prompts", "--prompt", "x", "--size", "48x64"],
            "must be multiples of 32 up to 1024 pixels, got 48x64",
        ),
        (
            ["--checkpoint", "{models}/prompts", "--prompt", " "],
            "a prompt is empty; describe the image",
        ),
        (
            ["--checkpoint", "{models}/prompts", "--prompt", "x", "--per-prompt", "0"],
            "--per-prompt must be positive, got 0",
        ),
        (
            ["--checkpoint", "{models}/prompts", "--prompt", "x", "--size", ""],
            "--size must be WIDTHxHEIGHT",
        ),
        (["--labels", "flag"], "unknown label 'flag'; did you mean 'Flags'?"),
        (["--labels", "Flags", "9"], "label 9 is out of range; the model has labels 0 to 8"),
        (["--labels", "-1"], "label -1 is out of range; the model has labels 0 to 8"),
        (["--checkpoint", "nowhere"], "no model folder nowhere"),
        (["--checkpoint", "{models}"], "{models} is not a model folder: it has no config.json"),
        (
            ["--checkpoint", "{models}/tokenizer"],
            "holds a tokenizer",
        ),
        (
            ["--checkpoint", "{models}/tokenizer", "--prompt", "x"],
            "holds a tokenizer",
        ),
        (["--checkpoint", "{models}/damaged"], "the model folder is damaged: "),
        (
            ["--checkpoint", "{models}/truncated", "--prompt", "x", "--size", "64x32"],
            "the model folder is damaged: ",
        ),
        (
            ["--checkpoint", "{models}/prompts", "--prompt", "x" * 1100],
            "tokens with its template, and at most 1022 fit; shorten it",
        ),
        (["--head-steps", "0"], "--head-steps must be positive, got 0"),
        (["--guidance-scale", "-1"], "--guidance-scale must not be negative, got -1.0"),
        (["--per-label", "0"], "--per-label must be positive, got 0"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (
            ["--per-label", "1000000000"],
            "a grid of 9,000,000,000 images of 128 x 128 is too large; 16,384 are the most",
        ),
        (
            ["--checkpoint", "{models}/prompts", "--prompt", "x", "--per-prompt", "300"],
            "a grid of 300 images of 1024 x 1024 is too large",
        ),
        (
            ["--head-steps", "1000000000000"],
            "--head-steps must be between 1 and 10000, got 1000000000000",
        ),
        (["--batch-size", "10000000"], "--batch-size must be between 1 and 65536, got 10000000"),
        (
            ["--npz", "x.npz", "--num-images", "1" + "0" * 18],
            "--num-images must be between 1 and 100000000, got 1000000000000000000",
        ),
        (["--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
        (["--dtype", "float16"], "invalid choice 'float16' for argument '--dtype'."),
        (["--label", "3"], "unknown flag --label; did you mean --labels?"),
        (["Flags"], "unknown argument Flags"),
        (["--num-images", "9"], "--num-images needs --npz OUT.npz"),
        (["--overwrite"], "--overwrite needs --npz OUT.npz"),
        (
            ["--npz", "x.npz", "--labels", "3"],
            "--labels are for a grid",
        ),
        (["--npz", "x.npz", "--per-label", "3"], "--per-label is for a grid"),
        (
            ["--checkpoint", "{models}/prompts", "--prompt", "x", "--per-label", "3"],
            "is a text-to-image model; --per-label is for class-conditional models",
        ),
        (["--npz", "x.npz", "--num-images", "0"], "--num-images must be positive, got 0"),
        (["--npz", "x.npz", "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
        (["--npz", "x.npz", "--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--out", "x.jpg"], "--out must be a local file that ends in .png, got x.jpg"),
        (
            ["--out", "gs://bucket/x.png"],
            "--out must be a local file that ends in .png, got gs://bucket/x.png",
        ),
        (
            ["--out", "new/x.png", "--checkpoint", "{models}/prompts", "--prompt", " "],
            "a prompt is empty",
        ),
        (["--guidance-scale", "nan"], "--guidance-scale must be a finite number, got nan"),
        (
            ["--compilation-cache", "/dev/null/x"],
            "cannot make the folder /dev/null/x: Not a directory",
        ),
        (
            ["--multi-host"],
            "--multi-host needs --npz OUT.npz or --prompt",
        ),
        (["--npz", "x.zip"], "--npz must be a local file that ends in .npz, got x.zip"),
        (
            ["--per-label", "two"],
            "Error parsing --per-label: 'two' is no INT",
        ),
    ],
)
def test_bad_input_is_one_line(sample, folders, tmp_path, flags, message):
    status, out, error = sample(*flags)
    assert (status, out) == (2, "")
    assert (
        error.startswith("error: ")
        and error.count("\n") == 1
        and message.format(models=folders) in error
    )
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_one_line(sample, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "device_memory", lambda _: 1e6)
    status, out, error = sample(
        "--checkpoint", "{models}/prompts", "--prompt", "x", "--size", "64x32", "--out", "new/x.png"
    )
    assert (status, out) == (2, "") and error.startswith("error: ") and error.count("\n") == 1
    assert "a device are needed (weights " in error and "and cpu has 0.0 GiB; " in error
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_line(sample, quick_samples, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, error = sample("--out", "file/x.png")
    assert status == 2
    assert error == "error: cannot write the image file/x.png: Not a directory\n"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.slow
def test_compiled_programs_are_kept(tiny, tmp_path, monkeypatch):
    """Another prompt finds every program in the cache: none is written again."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
    flags = "--size 12x8 --head-steps 1 --out x.png --compilation-cache cache".split()
    kept = []
    for prompt in ("a cat", "two dogs"):
        python([ROOT / "sample.py", "--checkpoint", tiny, "--prompt", prompt, *flags], tmp_path)
        programs = (tmp_path / "cache").glob("*-cache")
        kept.append({path.name: path.stat().st_mtime_ns for path in programs})
    assert kept[0] == kept[1] and len(kept[0]) >= 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A text-to-image model that is quick to compile; patches of 4 x 4 pixels."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    toy_text_to_image.save(folder, tiny_models.TEXT_TO_IMAGE)
    return folder


@pytest.mark.slow
def test_two_hosts_generate_prompts(tiny, tmp_path):
    """The mesh spans both, process 0 alone writes, and the images are as on one device."""
    prompts = ["a cat", "两只狗"]
    flags = "--size 12x8 --seed 3 --mesh.data 2 --mesh.tensor 2 --multi-host --out".split()
    command = [ROOT / "sample.py", "--checkpoint", tiny, "--prompt", *prompts, *flags]
    processes = start_job([[*command, f"{number}.png"] for number in range(2)], tmp_path, devices=2)
    (out, error), (other_out, other_error) = (
        process.communicate(timeout=120) for process in processes
    )
    assert [process.returncode for process in processes] == [0, 0], error + other_error
    assert (
        out.splitlines()[-1] == "2 images of 12x8 in 0.png" and "image" not in other_out
    )  # beside Gloo's words
    assert "sampling" in error and other_error == ""
    assert os.listdir(tmp_path) == ["0.png"]
    expected = image_files.grid(
        TextToImage.load(tiny).sample(prompts, size="12x8", seed=3, progress=False), columns=2
    )
    np.testing.assert_allclose(
        image_files.load_image(tmp_path / "0.png").astype(int), expected, atol=1
    )


@pytest.mark.slow
def test_a_host_with_damaged_weights_stops_both(tiny, tmp_path):
    damaged = shutil.copytree(tiny, tmp_path / "damaged")
    (damaged / "weights" / "_METADATA").unlink()
    flags = "--size 12x8 --prompt x --multi-host".split()
    processes = start_job(
        [[ROOT / "sample.py", "--checkpoint", folder, *flags] for folder in (tiny, damaged)],
        tmp_path,
    )
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    line = f"the model folder is incomplete: {damaged}/weights/_METADATA is missing; "
    line += "fetch or write the folder again\n"
    assert f"\nerror: process 1: {line}" in errors[0] and errors[1] == f"\nerror: {line}"
    assert not (tmp_path / "samples.png").exists()


@pytest.mark.slow
def test_from_training_to_images(tmp_path):
    """The commands of the shipped configs, made tiny by flags, then images of their model."""

    def command(script, *flags):
        return python([ROOT / script, *" ".join(flags).split()], tmp_path)

    run = "--run.steps 3 --run.log-every 1 --run.preview-every 3 --data.batch-size 8"
    command(
        "train.py",
        f"emoji_tokenizer --losses plain {run} --run.workdir tokenizer --image-size 16",
        "--model.bits 8 --model.ch-mult 1 1 --model.num-codebooks 2",
    )
    command(
        "train.py",
        f"emoji_4x {run} --run.workdir run --tokenizer tokenizer/model",
        "--model.image-size 16 --preview.head-steps 2",
        "--model.tokenizer.bits 8 --model.tokenizer.ch-mult 1 1 --model.tokenizer.num-codebooks 2",
        "--model.transformer.num-layers 2 --model.transformer.dim 32",
        "--model.transformer.num-heads 2",
        "--model.head.width 32 --model.head.num-blocks 1 --model.head.head-dim 16",
    )
    out = command(
        "sample.py",
        "--checkpoint run/model --labels flag drink --per-label 3 --head-steps 2 --out x.png",
    )
    assert out == "6 images of 2 labels in x.png\n"

    for name in ("tokenizer", "run"):
        rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        assert len(rows) == 4 and (tmp_path / name / "curves.png").exists()
    assert (tmp_path / "tokenizer" / "images" / "reconstructions_0000003.png").exists()
    assert (tmp_path / "run" / "images" / "samples_0000003.png").exists()
    assert {path.name for path in (tmp_path / "run").glob("tokens_*")} == {
        "tokens_train",
        "tokens_heldout",
    }
    with Image.open(tmp_path / "x.png") as image:
        assert image.height == 2 * 132 and image.width > 3 * 132
