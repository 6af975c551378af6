"""`bitdance train`: flags that override the config, and errors as one line."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bitdance_jax.cli import command_line
from bitdance_jax.cli import train as train_command
from bitdance_jax.config import RunConfig
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.run_folder import record_config
from bitdance_jax.train.tokenizer_training import TokenizerTraining


ROOT = Path(__file__).parents[2]

CONFIG = """
from bitdance_jax.config import RunConfig, TokenizerConfig
from bitdance_jax.train.tokenizer_training import TokenizerTraining

def get_config():
    model = TokenizerConfig(bits=8, ch=32, ch_mult=(1, 2), num_res_blocks=1)
    run = RunConfig(workdir="runs/test", steps=3)
    return TokenizerTraining(run=run, model=model, image_size=64)
"""


@pytest.fixture
def command(monkeypatch):
    """The command, for this process, which joins no others: JAX is initialized already."""
    monkeypatch.setattr(train_command.multihost, "initialize", lambda config: False)
    return train_command


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def run(command, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    code = command_line.run(command.main)
    return code, capsys.readouterr().err


def test_flags_override_the_file(command, config_file):
    flags = "--run.steps 100 --model.ch-mult 1 2 2 --optimizer.clip-norm None "
    flags += "--run.compute-dtype bfloat16 --optimizer.learning_rate=1e-3"
    default, _ = command.load_config(str(config_file))
    config = command.parse(type(default), flags.split(), default, "train.py")
    assert (config.run.steps, config.run.compute_dtype, config.run.workdir) == (
        100,
        "bfloat16",
        "runs/test",
    )
    assert config.model.ch_mult == (1, 2, 2)
    assert (config.optimizer.clip_norm, config.optimizer.learning_rate) == (None, 1e-3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no config file"),
        ("x = 1", "has no function get_config"),
        ("get_config = 3", "has no function get_config"),
        ("def get_config(size: 'Foo' = 3): pass", "NameError: name 'Foo' is not defined"),
        ("def get_config(:", "SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("import sys; sys.exit()", "SystemExit"),
        (
            "def get_config(): return 3",
            "get_config() must return a TrainingConfig, got int",
        ),
        (CONFIG.replace("steps=3", "steps=0"), "steps must be positive, got 0"),
    ],
)
def test_a_bad_config_file_is_one_line(command, monkeypatch, capsys, tmp_path, source, message):
    path = tmp_path / "bad.py"
    if source is not None:
        path.write_text(source)
    code, error = run(command, monkeypatch, capsys, path)
    assert code == 2
    assert (
        error.startswith("error: ")
        and error.count("\n") == 1
        and str(path) in error
        and message in error
    )


def test_an_unknown_flag_names_the_nearest(command, monkeypatch, capsys, config_file):
    code, error = run(command, monkeypatch, capsys, config_file, "--run.step", "3")
    assert code == 2
    assert (
        error
        == "error: unknown flag --run.step; did you mean --run.steps? (--help lists them all)\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run.steps", "x"], "invalid literal for int()"),
        (["--run.steps", "-1"], "steps must be positive"),
        (["--run.steps"], "Missing value"),
    ],
)
def test_a_bad_value_is_named(command, monkeypatch, capsys, config_file, flags, message):
    code, error = run(command, monkeypatch, capsys, config_file, *flags)
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh.tensor", "64"], "mesh.tensor"),
        (
            ["--data.batch-size", "6", "--run.accumulate", "4"],
            "--data.batch-size must be a multiple of --run.accumulate, got 6 and 4",
        ),
        (
            ["--profile", "7", "5"],
            "--profile must be two steps in order, from 1 to --run.steps (3), got (7, 5)",
        ),
        (["--data.source", "folder"], "data.path"),
        (["--data.source", "folder", "--data.path", "no/such"], "no/such"),
    ],
)
def test_what_cannot_run_is_one_line_before_anything_compiles(
    command, monkeypatch, capsys, config_file, tmp_path, flags, message
):
    monkeypatch.setattr(jax, "jit", refuse)
    code, error = run(
        command, monkeypatch, capsys, config_file, "--run.workdir", str(tmp_path / "run"), *flags
    )
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_config_is_found_before_data_and_weights_are_opened(
    command, monkeypatch, capsys, config_file, tmp_path
):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    record_config(
        dataclasses.replace(
            command.load_config(str(config_file))[0], run=RunConfig(workdir=str(tmp_path), steps=3)
        )
    )
    monkeypatch.setattr(TokenizerTraining, "make_task", refuse)
    code, error = run(
        command,
        monkeypatch,
        capsys,
        config_file,
        "--run.workdir",
        str(tmp_path),
        "--model.bits",
        "16",
    )
    assert code == 2
    assert str(tmp_path) in error and "model.bits was 8, now 16" in error


@pytest.fixture
def classes_of(command, monkeypatch, tmp_path):
    """The number of classes that train.py trains with for images in three classes, and flags."""
    for name in ("bird", "cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
    seen = []
    monkeypatch.setattr(ClassConditionalTraining, "make_task", lambda config: config)
    monkeypatch.setattr(
        command, "train", lambda task, config, **_: seen.append(config.model.num_classes)
    )
    workdir = ["--run.workdir", str(tmp_path / "run")]

    def classes(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", "emoji_4x", *workdir, *flags])
        assert command_line.run(command.main) == 0
        return seen.pop()

    return classes


def test_the_number_of_classes_is_that_of_the_data_unless_it_is_given(classes_of, tmp_path):
    own = ["--data.source", "folder", "--data.path", str(tmp_path / "images")]
    assert classes_of() == 97
    assert classes_of(*own) == 3
    assert [
        classes_of(*own, flag, "4") for flag in ("--model.num-classes", "--model.num_classes")
    ] == [4, 4]
    assert classes_of(*own, "--model.num-classes=5") == 5


def refuse(*arguments, **keywords):
    raise AssertionError


def test_without_a_config_file_it_says_how(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command_line.run(command.main) == 2
    assert "train.py CONFIG" in capsys.readouterr().err


def test_help_lists_the_flags(tmp_path, config_file):
    """A real process, started from another folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    process = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(config_file), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0
    assert "--optimizer.learning-rate" in process.stdout
