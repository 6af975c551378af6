"""The images of benchmarks' prompts, from a small text-to-image model."""

import functools
import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from PIL import Image
from processes import start_job

from bitdance_jax.cli import prompts as prompts_command
from bitdance_jax.cli.command_line import run
from bitdance_jax.config import SamplerConfig
from bitdance_jax.evaluate import prompt_images as prompts
from bitdance_jax.evaluate.prompt_files import Prompt
from bitdance_jax.evaluate.prompt_lists import compare_with_published, read_dpg, read_geneval
from bitdance_jax.io import image_files
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.pipelines import toy_text_to_image
from bitdance_jax.pipelines.text_to_image import TextToImage


LINES = [
    b'{"tag": "single_object",  "include": [{"class": "bench"}], "prompt": "a photo of a bench"}\n',
    b'{"prompt": "a photo of a cow", "tag": "single_object"}\n',
    '{"prompt": "两只猫"}'.encode(),
]
SMALL = ["--size", "12x8", "--head-steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "toy"
    toy_text_to_image.save(folder, tiny_models.TEXT_TO_IMAGE)
    return folder


@pytest.fixture(scope="module")
def command(folder):
    """Runs the command in the working directory; all runs share a compiled model."""
    with pytest.MonkeyPatch.context() as patch:
        load = functools.cache(TextToImage.load)
        patch.setattr(prompts.TextToImage, "load", load)

        def command(*flags: str, checkpoint: str | Path = folder) -> int:
            patch.setattr(sys, "argv", ["prompts", "--checkpoint", str(checkpoint), *flags])
            return run(prompts_command.main)

        yield command


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("geneval.jsonl").write_bytes(b"".join(LINES))


def contents(folder: str) -> dict[str, tuple[bytes, int]]:
    """The bytes and the time of every file."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in paths
    }


def text_chunks(file: str) -> dict[str, str]:
    with Image.open(file) as image:
        return dict(image.info)


def without_times(files: dict[str, tuple[bytes, int]]) -> dict[str, bytes]:
    return {name: data for name, (data, _) in files.items()}


def test_geneval_and_resuming(command, capsys):
    """The layout, and the same bytes in a resumed folder and after a file was lost."""
    flags = "--geneval geneval.jsonl --per-prompt 3 --seed 5 --batch-size 2".split() + SMALL
    assert command(*flags, "--out", "full") == 0
    assert capsys.readouterr().out == "3 images of each of 3 prompts in full\n"
    full = contents("full")
    files = ["metadata.jsonl", "grid.png", *(f"samples/{j:04d}.png" for j in range(3))]
    assert sorted(full) == sorted(f"{i:05d}/{file}" for i in range(3) for file in files)
    assert [full[f"{i:05d}/metadata.jsonl"][0] for i in range(3)] == LINES

    samples = [
        [image_files.load_image(f"full/{i:05d}/samples/{j:04d}.png") for j in range(3)]
        for i in range(3)
    ]
    assert samples[0][0].shape == (8, 12, 3)
    assert len({image.tobytes() for row in samples for image in row}) == 9
    grid = image_files.load_image("full/00001/grid.png")
    expected = np.block(
        [[[samples[1][0]], [samples[1][1]]], [[samples[1][2]], [np.zeros((8, 12, 3), np.uint8)]]]
    )
    np.testing.assert_array_equal(grid, expected)

    text = text_chunks("full/00001/samples/0002.png")
    index = str(2 * prompts.STRIDE + 1)
    described = {"prompt": json.loads(LINES[1])["prompt"], "seed": "5", "index": index}
    assert text.items() >= (described | {"guidance_scale": "13.0"}).items()
    del text["index"]
    assert text_chunks("full/00001/grid.png") == text

    assert command(*flags, "--out", "parts", "--limit", "1") == 0
    assert "3 images of each of 1 prompts in parts\n" in capsys.readouterr().out
    first = contents("parts")
    assert set(first) == {f"00000/{file}" for file in files}
    assert command(*flags, "--out", "parts") == 0
    assert "3 images of each of 3 prompts in parts (2 generated now)\n" in capsys.readouterr().out
    Path("parts/00001/samples/0001.png").unlink()
    before = contents("parts")
    Path("parts/00001/samples/.bitdance_jax.0123456789abcdef").touch()  # of a killed process
    assert command(*flags, "--out", "parts") == 0
    after = contents("parts")
    assert without_times(after) == without_times(full)
    assert before.items() <= after.items()
    assert first.items() <= before.items()
    assert command(*flags, "--out", "parts") == 0
    assert "(0 generated now)" in capsys.readouterr().out
    assert contents("parts") == after


@pytest.fixture
def quick(monkeypatch) -> list[dict]:
    """Replaces the model by grey images of their numbers; returns the calls."""
    calls = []

    def sample(self, texts, *, size, first_index, **options):
        calls.append({"texts": texts, "size": size, "first_index": first_index, **options})
        numbers = np.arange(first_index, first_index + len(texts))
        values = (50 * (numbers // prompts.STRIDE) + numbers % prompts.STRIDE).astype(np.uint8)
        return np.broadcast_to(values[:, None, None, None], (len(texts), 32, 32, 3))

    monkeypatch.setattr(TextToImage, "sample", sample)
    monkeypatch.setattr(TextToImage, "metadata", lambda self, texts, **_: [{}] * len(texts))
    monkeypatch.setattr(prompts, "check_size", lambda *_: None)
    return calls


def test_an_image_depends_only_on_its_numbers(command, quick):
    """Not on the number of images of a prompt, nor on the batch size."""
    flags = ["--geneval", "geneval.jsonl"]
    assert command(*flags, "--batch-size", "2", "--per-prompt", "1", "--out", "pairs") == 0
    assert command(*flags, "--batch-size", "3", "--per-prompt", "2", "--out", "threes") == 0
    for i in range(3):
        for out, j in (("pairs", 0), ("threes", 0), ("threes", 1)):
            image = image_files.load_image(f"{out}/{i:05d}/samples/{j:04d}.png")
            assert np.all(image == 50 * j + i)


@pytest.mark.parametrize("kind", ["folder", "json"])
def test_dpg(command, quick, kind):
    """A grid of 2 by 2 without padding, named by the prompt's id."""
    texts = {"COCOval2014_7": "a red truck", "drawtext-9": "two dogs", "partiprompts1": "three"}
    Path("prompts").mkdir()
    for name, text in texts.items():
        Path(f"prompts/{name}.txt").write_text(text + "\n")
    Path("prompts.json").write_text(json.dumps(texts))
    given = "prompts" if kind == "folder" else "prompts.json"
    assert command("--dpg", given, "--out", "out", "--batch-size", "2") == 0
    assert sorted(contents("out")) == sorted(f"{name}.png" for name in texts)
    for i, name in enumerate(texts):
        quarters = np.array([[i, 50 + i], [100 + i, 150 + i]], np.uint8).repeat(32, 0).repeat(32, 1)
        np.testing.assert_array_equal(
            image_files.load_image(f"out/{name}.png"), np.stack([quarters] * 3, -1)
        )
    batches = [["a red truck", "two dogs"]] * 4 + [["three", "three"]] * 4
    assert [call["texts"] for call in quick] == batches


ONEIG = """category,id,prompt_{language},type,prompt_length,class
Anime_Stylization,000,"a ""chibi"" cat,
asleep",NP,short,chibi
Portrait,000,a man,P,short,None
Knowledge_Reasoning,017,a cell,NP,short,None
"""


@pytest.mark.parametrize("language", ["en", "cn"])
def test_oneig(command, quick, language):
    """A grid for each prompt: CATEGORY'S FOLDER/MODEL/ID.png."""
    Path("OneIG.csv").write_text(ONEIG.format(language=language))
    assert command("--oneig", "OneIG.csv", "--out", "out", "--limit", "2") == 0
    assert command("--oneig", "OneIG.csv", "--out", "out") == 0
    assert sorted(contents("out")) == [
        "anime/toy/000.png",
        "human/toy/000.png",
        "reasoning/toy/017.png",
    ]
    quarters = np.array([[2, 52], [102, 152]], np.uint8).repeat(32, 0).repeat(32, 1)
    image = image_files.load_image("out/reasoning/toy/017.png")
    np.testing.assert_array_equal(image, np.stack([quarters] * 3, -1))
    assert quick[0]["texts"] == ['a "chibi" cat,\nasleep', "a man", "a cell", "a cell"]
    assert quick[0]["sampler"].guidance_scale == 7.5


def tiif(kind: str, prompt: str, **fields: str) -> str:
    line = {"type": kind, "short_description": prompt, "long_description": f"long {prompt}"}
    return json.dumps(line | fields) + "\n"


def test_tiif(command, quick, capsys):
    """One image of each description, numbered by the line in its file."""
    Path("prompts").mkdir()
    Path("prompts/b_prompts.jsonl").write_text(
        tiif("action+3d", "a") + "\n" + tiif("action+3d", "b")
    )
    Path("prompts/a_prompts.jsonl").write_text(tiif("text", "c", yn_question_list="Is it c?"))
    Path("prompts/notes.txt").touch()
    flags = ["--tiif", "prompts", "--batch-size", "2"]
    assert command(*flags, "--out", "out", "--name", "bitdance-14b") == 0
    lines = [("text", 0), ("action+3d", 0), ("action+3d", 1)]
    names = [
        f"{kind}/bitdance-14b/{length}_description/{index}.png"
        for kind, index in lines
        for length in ("short", "long")
    ]
    assert sorted(contents("out")) == sorted(names)
    texts = [text for call in quick for text in call["texts"]]
    assert texts == ["c", "long c", "a", "long a", "b", "long b"]
    for i, name in enumerate(names):
        image = image_files.load_image(f"out/{name}")
        assert image.shape == (32, 32, 3) and np.all(image == i)
    assert command(*flags, "--out", "out", "--name", "other") == 2
    assert "name 'bitdance-14b', requested 'other'" in capsys.readouterr().err
    assert command("--tiif", "prompts/b_prompts.jsonl", "--out", "one") == 0
    assert len(contents("one")) == 4


def test_released_settings(command, quick):
    released = SamplerConfig(head_steps=50, guidance_scale=13.0, guidance_schedule="constant")
    assert command("--geneval", "geneval.jsonl", "--out", "g") == 0
    Path("d.json").write_text('{"1": "a cat"}')
    assert command("--dpg", "d.json", "--out", "d") == 0
    shared = {"size": "1024x1024", "seed": 0, "batch_size": 4}
    texts = ["a photo of a bench", "a photo of a cow", "两只猫", "两只猫"]
    shared |= {"texts": texts, "sampler": released}
    assert quick[:4] == [
        shared | {"first_index": j * prompts.STRIDE, "progress": j == 0} for j in range(4)
    ]
    assert len(quick) == 8
    assert quick[4]["sampler"] == SamplerConfig(
        head_steps=50, guidance_scale=7.5, guidance_schedule="constant"
    )
    assert command("--dpg", "d.json", "--out", "fast", "--sampler", "fast") == 0
    assert quick[-1]["sampler"] == quick[4]["sampler"].named("fast")
    flags = ["--sampler", "fast", "--head-steps", "8"]
    assert command("--dpg", "d.json", "--out", "faster", *flags) == 0
    assert (quick[-1]["sampler"].solver, quick[-1]["sampler"].head_steps) == ("multistep_sde", 8)


@pytest.mark.parametrize(
    ("texts", "note"),
    [
        (
            ["a photo of a bench", "a photo of two cows"] * 276 + ["a photo of a cat"],
            "GenEval's original prompts",
        ),
        (
            [f"A wooden bench in park {n}" for n in range(553)],
            "for such prompts",
        ),
        (
            ["A wooden bench"],
            "1 other prompts",
        ),
    ],
)
def test_whether_published_scores_can_be_compared(tmp_path, texts, note):
    Path("x.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert note in compare_with_published(read_geneval("x.jsonl"))


def test_the_command_prints_whether_scores_can_be_compared(command, quick, capsys):
    assert command("--geneval", "geneval.jsonl", "--out", "out") == 0
    assert capsys.readouterr().err.startswith("note: the published scores, 0.86 (14B-16x)")
    Path("d.json").write_text('{"1": "a cat"}')
    assert command("--dpg", "d.json", "--out", "dpg") == 0
    assert "note:" not in capsys.readouterr().err


def test_other_settings_are_an_error(command, quick, folder, tmp_path, capsys):
    flags = ["--geneval", "geneval.jsonl", "--out", "out", "--limit", "1"]
    assert command(*flags, "--guidance-scale", "3") == 0
    assert command(*flags, "--guidance-scale", "3", "--limit", "2", "--batch-size", "1") == 0
    toy_text_to_image.save(tmp_path / "other", tiny_models.TEXT_TO_IMAGE, seed=1)
    assert command(*flags, "--seed", "4", checkpoint=tmp_path / "other") == 2
    error = capsys.readouterr().err
    assert "error: out was begun with other settings (checkpoint " in error
    assert "seed 0, requested 4" in error
    Path("geneval.jsonl").write_bytes(LINES[1])
    assert command(*flags, "--guidance-scale", "3") == 2
    assert "out was begun with other settings (prompts " in capsys.readouterr().err
    Path("out.settings.json").write_text("[")
    assert command(*flags) == 2
    assert "out.settings.json cannot be read: " in capsys.readouterr().err
    shutil.move("out.settings.json", "old.json")
    assert command(*flags) == 2
    assert "out is not empty and has no out.settings.json" in capsys.readouterr().err
    shutil.rmtree("out")
    Path("out.settings.json").write_text('{"mine": 1}')
    assert command(*flags) == 2
    assert "out.settings.json is not of this command" in capsys.readouterr().err
    Path("out.settings.json").write_text('{"seed": 4}')  # of images that were removed
    assert command(*flags) == 0


def test_only_damaged_files_are_written_again(command, quick):
    flags = ["--geneval", "geneval.jsonl", "--per-prompt", "2", "--batch-size", "1", "--out", "out"]
    assert command(*flags) == 0
    full = contents("out")
    image = bytearray(full["00000/samples/0001.png"][0])
    image[60] ^= 1
    damage = {
        "00000/samples/0001.png": bytes(image),
        "00000/metadata.jsonl": LINES[0][:20],
        "00001/grid.png": b"",  # after a loss of power, on some file systems
        "00001/samples/0000.png": full["00001/samples/0000.png"][0][:-20],
    }
    for name, data in damage.items():
        Path("out", name).write_bytes(data)
    quick.clear()
    assert command(*flags) == 0
    # Only the first two prompts are generated.
    numbers = [0, prompts.STRIDE, 1, prompts.STRIDE + 1]
    assert [call["first_index"] for call in quick] == numbers
    after = contents("out")
    assert without_times(after) == without_times(full)
    assert {name for name in full if after[name] != full[name]} == damage.keys()


def test_a_second_command_in_the_folder_is_an_error(command, quick, capsys):
    with writer_lock("out", is_folder=True):
        assert command("--geneval", "geneval.jsonl", "--out", "out") == 2
    assert "another process is writing out" in capsys.readouterr().err
    assert quick == []
    assert not Path("out").exists()


def test_an_image_that_cannot_be_written_is_an_error(command, quick, monkeypatch, capsys):
    """Also if a thread writes it after the last image was generated."""
    monkeypatch.setattr(
        Prompt,
        "write",
        lambda self, folder, images, texts: image_files.save_png("/dev/null/x.png", images[0]),
    )
    assert command("--geneval", "geneval.jsonl", "--out", "out") == 2
    assert "/dev/null/x.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "data", "named"),
    [
        ([], b"", "--geneval .*--dpg"),
        (["--geneval", "x", "--dpg", "x"], b"", "--geneval .*--dpg"),
        (["--geneval", "none.jsonl"], b"", "none.jsonl"),
        (["--dpg", "none"], b"", "none"),
        (["--geneval", "x"], b"\n", "x has no prompts"),
        (["--geneval", "x"], LINES[0] + b"\n{prompt", "line 3 of x"),
        (["--geneval", "x"], LINES[0] + b'{"prompts": "a cat"}', "line 2 of x .*prompt"),
        (["--geneval", "x"], b'["prompt"]', "line 1 of x .*array"),
        (["--geneval", "x"], b'{"prompt": ["a cat"]}', "line 1 of x .*prompt"),
        (["--geneval", "x"], b'{"prompt": "a", "tag": ' + b"[" * 200_000, "line 1 of x"),
        (["--geneval", "x"], b"version https://git-lfs.github.com/spec/v1\n", "x .*Git LFS"),
        (["--geneval", "/dev/zero"], b"", "/dev/zero"),
        (["--geneval", "x"], b'{"prompt": " "}', "line 1 of x.* empty"),
        (["--geneval", "x"], LINES[0] + b'{"prompt": "%s"}' % (b"x" * 1100), "line 2 of x.*'xxx"),
        (["--dpg", "x"], b"{}", "x has no prompts"),
        (["--dpg", "x"], b"a cat", "x .*JSON"),
        (["--dpg", "x"], b'["a cat"]', "x .*array.*ID.txt"),
        (["--dpg", "x"], b'{"1": {"prompt": "a cat"}}', "x .*object"),
        (["--dpg", "x"], b'{"1": "a", "2": "b", "1": "c"}', "x .*duplicate.* 1;"),
        (["--dpg", "x"], b'{"a/b": "a"}', "x.*'a/b'"),
        (["--dpg", "x"], b'{"1.5": "a"}', "x.*'1.5'"),
        (["--dpg", "x"], b'{"1": "a", "q": "%s"}' % (b"x" * 1100), "'q' of x: .*'xxx"),
        (["--oneig", "x"], b"a cat", "x .*category, id"),
        (["--oneig", "x"], b"category,id,prompt_en,prompt_cn\n", "x .*either"),
        (["--oneig", "x"], b"category,id,prompt_en\n", "x has no prompts"),
        (["--oneig", "x"], b"category,id,prompt_en\nCats,000,a", "line 2 of x.*'Cats'.*Portrait"),
        (["--oneig", "x"], b"category,id,prompt_en\nPortrait,7,a", "line 2 of x.*'7'.*007"),
        (["--oneig", "x"], b"category,id,prompt_en\nPortrait", "line 2 of x.*three digits"),
        (["--oneig", "x"], b"category,id,prompt_en\nPortrait,007", "line 2 of x.* empty"),
        (["--oneig", "x"], b'category,id,prompt_en\nPortrait,007,"a', "line 2 of x cannot be read"),
        (
            ["--oneig", "x"],
            b"category,id,prompt_en\nPortrait,007,a\nPortrait,007,b",
            "line 3 of x and line 2 of x both name .*human/toy/007.png",
        ),
        (["--oneig", "x", "--name", "a/b"], b"", "'a/b' cannot .*--name bitdance"),
        (["--dpg", "x", "--name", "a"], b"", "DPG-Bench .*omit --name a"),
        (["--tiif", "none"], b"", "none"),
        (["--tiif", "x"], b"", "x has no prompts"),
        (["--tiif", "x"], b'{"type": "a", "short_description": "b"}', "line 1 of x.*long_desc"),
        (["--tiif", "x"], tiif("../a", "b").encode(), "line 1 of x: the type '../a'"),
        (["--tiif", "x", "--per-prompt", "2"], b"", "--per-prompt"),
        (["--dpg", "x", "--size", "128x64"], b'{"1": "a"}', "128x64"),
        (["--dpg", "x", "--per-prompt", "5"], b'{"1": "a"}', "--per-prompt"),
        (["--geneval", "x", "--limit", "0"], LINES[0], "--limit"),
        (["--geneval", "x", "--per-prompt", "5000"], LINES[0], "--per-prompt"),
        (["--geneval", "x", "--head-steps", "1000000000000"], LINES[0], "--head-steps"),
        (["--geneval", "x", "--head-steps", "0"], LINES[0], "--head-steps"),
        (["--geneval", "x", "--batch-size", "10000000"], LINES[0], "--batch-size"),
        (["--geneval", "x", "--size", "64"], LINES[0], "size .*64"),
        (["--geneval", "x", "--size", "14x8"], LINES[0], "14x8"),
        (["--geneval", "x", "--size", "12x8", "--seed", "-1"], LINES[0], "seed"),
        (["--geneval", "x", "--out", "gs://bucket/x"], LINES[0], "--out"),
        (["--geneval", "x", "--size", "12x8", "--out", "x"], LINES[0], "x/any.png"),
    ],
)
def test_bad_input(command, monkeypatch, capsys, flags, data, named):
    """One line, before the weights are read, and no new files."""
    monkeypatch.setattr(
        TextToImage, "params", property(lambda self: pytest.fail("weights were read"))
    )
    Path("x").write_bytes(data)
    assert command(*flags, *([] if "--out" in flags else ["--out", "out"])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(named, error)
    assert error.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["geneval.jsonl", "x"]


def test_damaged_weights_leave_no_folder(command, folder, capsys):
    damaged = shutil.copytree(folder, "damaged")
    Path(damaged, "weights", "_METADATA").unlink()
    assert command("--geneval", "geneval.jsonl", "--out", "out", *SMALL, checkpoint=damaged) == 2
    assert "error: the model folder is incomplete: " in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_one_resumes(command, folder, capsys):
    """One is killed at some moment: all files are complete, and resuming gives the same images."""
    Path("many.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} cats"}) + "\n" for n in range(40))
    )
    flags = ["--geneval", "many.jsonl", "--per-prompt", "2", "--batch-size", "1", *SMALL]
    assert command(*flags, "--out", "full") == 0
    script = ["-m", "bitdance_jax.evaluate.prompts", "--checkpoint", folder, *flags, "--multi-host"]
    processes = start_job([[*script, "--out", out] for out in ("parts", "unused")], Path.cwd())
    while not Path("parts/00006/grid.png").exists():
        assert processes[1].poll() is None, processes[1].communicate()
        time.sleep(0.002)
    processes[1].kill()
    _, error = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 2
    assert "error: process 1 is gone (" in error
    assert not Path("unused").exists()
    assert "images" not in processes[1].communicate()[0]

    begun = {
        name: file
        for name, file in contents("parts").items()
        if not Path(name).name.startswith(".")
    }
    finished = [name for name in begun if name.endswith("grid.png")]
    assert 7 <= len(finished) < 40
    for name in begun:
        assert not name.endswith(".png") or image_files.load_image(f"parts/{name}").shape == (
            (8, 12, 3) if "samples" in name else (8, 24, 3)
        )
    capsys.readouterr()
    assert command(*flags, "--out", "parts") == 0
    assert "2 images of each of 40 prompts in parts (" in capsys.readouterr().out
    parts = contents("parts")
    assert set(contents("full")) == set(parts)
    assert begun.items() <= parts.items()
    for name in parts:
        if name.endswith(".png"):
            one, other = (
                image_files.load_image(f"{out}/{name}").astype(int) for out in ("full", "parts")
            )
            np.testing.assert_allclose(one, other, atol=1)


def test_other_models(command, tmp_path, capsys):
    assert command("--geneval", "geneval.jsonl", "--out", "out", checkpoint="emoji_classes") == 2
    assert "class_conditional" in capsys.readouterr().err
    assert command("--geneval", "geneval.jsonl", "--out", "out", checkpoint=tmp_path / "none") == 2
    assert f"{tmp_path}/none" in capsys.readouterr().err


def test_prompts_and_their_names(tmp_path):
    assert read_geneval("geneval.jsonl")[1] == Prompt(
        "00001", "a photo of a cow", "line 2 of geneval.jsonl", LINES[1]
    )
    Path("blank.jsonl").write_bytes(LINES[0] + b"\n" + LINES[1])
    assert [prompt.name for prompt in read_geneval("blank.jsonl")] == ["00000", "00001"]
    # The scorer could not read a line with a byte order mark.
    Path("marked.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES[0])
    assert read_geneval("marked.jsonl") == [
        Prompt("00000", "a photo of a bench", "line 1 of marked.jsonl", LINES[0])
    ]
    Path("marked").mkdir()
    Path("marked/1.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n")
    assert read_dpg("marked") == [Prompt("1", "a cat", "marked/1.txt")]
    Path("marked.json").write_bytes(b'\xef\xbb\xbf{"1": "a cat"}')
    assert read_dpg("marked.json") == [Prompt("1", "a cat", "'1' of marked.json")]
    Path("folder").mkdir()
    Path("folder/1.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"folder/1\.txt is not UTF-8 text"):
        read_dpg("folder")
