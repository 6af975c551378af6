"""Flags to dataclasses, exit statuses, and errors as one line."""

import dataclasses
import importlib
import importlib.util
import io
import logging
import os
import signal
import subprocess
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import processes
import pytest
import tyro

from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import SamplerConfig
from bitdance_jax.config.plain import PathName
from bitdance_jax.data.config import DataConfig
from bitdance_jax.errors import UserError
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining


@dataclass(frozen=True)
class Arguments:
    """Does things.

    Attributes:
      out: the file.
      steps: how many.
    """

    out: str
    steps: int = 3
    kind: Literal["plain", "fancy"] = "plain"
    sizes: tuple[int, ...] | None = None
    scale: float | None = None
    sampler: SamplerConfig = SamplerConfig()


DEFAULT = Arguments("here", steps=5, sampler=SamplerConfig(head_steps=20))


MANY = "0123456789 " * 12 + "end"  # wider than a terminal
IMPORTS = "import sys; from bitdance_jax.cli.command_line import run"


def complaint(*flags, default=DEFAULT):
    with pytest.raises(UserError) as caught:
        parse(Arguments, flags, default)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values():
    flags = "--out there --steps 4 --kind fancy --sizes 1 2 3 --scale 2 "
    flags += "--sampler.solver euler --sampler.guidance-scale=1.5"
    expected = Arguments(
        "there", 4, "fancy", (1, 2, 3), 2.0, SamplerConfig(solver="euler", guidance_scale=1.5)
    )
    assert parse(Arguments, flags.split()) == expected


def test_fields_without_a_flag_come_from_the_default():
    assert parse(Arguments, [], DEFAULT) == DEFAULT
    expected = Arguments("here", steps=5, sampler=SamplerConfig(head_steps=20, guidance_scale=3.0))
    assert parse(Arguments, ["--sampler.guidance_scale", "3"], DEFAULT) == expected


def test_without_flags_it_reads_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool.py", "--steps", "7"])
    assert parse(Arguments, default=DEFAULT).steps == 7


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--step", "--steps"),
        ("--sampler.head-step", "--sampler.head-steps"),
        ("--sampler.guidance_scal=2", "--sampler.guidance-scale"),
        ("--knid", "--kind"),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag, nearest):
    assert (
        complaint(flag, "3")
        == f"unknown flag {flag}; did you mean {nearest}? (--help lists them all)"
    )


@pytest.mark.parametrize(("flag", "kind"), [("--zzzzzz", "flag"), ("stray", "argument")])
def test_an_unknown_flag_without_a_similar_one(flag, kind):
    assert complaint(flag) == f"unknown {kind} {flag} (--help lists them all)"


def test_the_nearest_flag_without_a_default():
    with pytest.raises(
        UserError, match=r"unknown flag --sampler\.head-stps; did you mean --sampler\.head-steps\?"
    ):
        parse(Arguments, ["--out", "x", "--sampler.head-stps", "3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "x"], "Error parsing --steps: invalid literal for int() with base 10: 'x'"),
        (
            ["--steps", "2.5"],
            "Error parsing --steps: invalid literal for int() with base 10: '2.5'",
        ),
        (["--steps"], "Missing value for argument '--steps'. Expected 1 values."),
        (
            ["--kind", "odd"],
            "invalid choice 'odd' for argument '--kind'. Expected one of ('plain', 'fancy').",
        ),
        (
            ["--sampler.head-steps", "0"],
            "--sampler.head-steps must be positive, got 0",
        ),
        (
            ["--steps", MANY],
            f"Error parsing --steps: invalid literal for int() with base 10: '{MANY}'",
        ),
    ],
)
def test_a_bad_value_is_one_line(flags, message):
    assert complaint(*flags) == message


@dataclass(frozen=True)
class Positive:
    """Arguments that check themselves."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--steps must be positive, got {self.steps}")


def test_a_bad_value_of_an_optional_flag_names_one_type():
    @dataclass(frozen=True)
    class Optional:
        steps: int | None = None

    with pytest.raises(UserError, match=r"^Error parsing --steps: '1\.5' is no INT$"):
        parse(Optional, ["--steps", "1.5"])


def test_an_error_of_the_dataclass_itself():
    with pytest.raises(UserError, match=r"^--steps must be positive, got 0$"):
        parse(Positive, ["--steps", "0"])


def test_a_missing_value_names_its_flag():
    with pytest.raises(UserError, match=r"^Missing from .*: --out STR the file\. \(required\)$"):
        parse(Arguments, ["--steps", "4"])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_frame_is_removed_in_every_encoding(monkeypatch, encoding):
    """tyro prints its box with the characters of stdout's encoding."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert (
        complaint("--steps", "x")
        == "Error parsing --steps: invalid literal for int() with base 10: 'x'"
    )


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Arguments, ["--help"], prog="tool.py")
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert (
        "tool.py" in out
        and "Does things." in out
        and "how many." in out
        and "--sampler.head-steps" in out
    )
    assert err == ""


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_run_returns_the_status(returned, status):
    assert run(lambda: returned) == status


def test_run_prints_one_line_for_bad_input(capsys):
    def main():
        raise UserError("no model folder x")

    assert run(main) == 2
    assert capsys.readouterr() == ("", "error: no model folder x\n")


def test_quoted_text_stays_on_the_line(capsys):
    """Keys of files may have line ends, escape sequences and surrogates, and may be very long."""

    def main():
        raise UserError("unknown key a\nb\x1b[2J\udcff é " + "k" * 10**6)

    assert run(main) == 2
    printed = capsys.readouterr().err
    assert (
        printed.startswith("error: unknown key a\\nb\\x1b[2J\\udcff é k")
        and printed.count("\n") == 1
    )
    assert len(printed) < 5000 and printed.endswith("k ... (1,000,023 characters)\n")


def test_a_name_that_is_too_long_is_one_line(capsys, tmp_path):
    assert run(lambda: (tmp_path / ("x" * 5000)).stat().st_size) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "too long" in printed and printed.count("\n") == 1


def test_an_error_of_the_system_is_one_line(capsys, tmp_path):
    def main() -> None:
        tmp_path.write_text("")

    assert run(main) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"


@pytest.mark.parametrize("output", ["/dev/full", "closed pipe"])
def test_output_that_cannot_be_written_is_one_line(output):
    code = f"{IMPORTS}; sys.exit(run(lambda: print('done')))"
    if output == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(output, os.O_WRONLY)
    tool = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert tool.returncode == 2 and len(tool.stderr.splitlines()) == 1
    assert tool.stderr.startswith("error: cannot write, perhaps to the output: ")


def test_letters_that_the_output_cannot_encode_are_escaped():
    code = f"{IMPORTS}; sys.exit(run(lambda: print('na\\xefve \\udcff')))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    tool = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert tool.stdout == "na\\xefve \\udcff\n"


def test_a_current_folder_that_is_gone_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(lambda: print(os.path.abspath("x"))) == 2
    assert (
        capsys.readouterr().err
        == "error: the current folder does not exist any more; change to another one\n"
    )


def test_run_prints_one_line_for_ctrl_c(capsys):
    def main():
        raise KeyboardInterrupt

    assert run(main) == 130
    assert capsys.readouterr() == ("", "stopped\n")


def test_run_does_not_hide_bugs():
    def main():
        raise KeyError("x")

    with pytest.raises(KeyError):
        run(main)


def test_a_full_device_is_one_line(capsys):
    assert (
        run(lambda: jax.block_until_ready(jax.jit(lambda: jnp.ones((2**40,)) + 1)()) and None) == 2
    )
    error = capsys.readouterr().err
    assert (
        error.startswith("error: a device's memory is full (RESOURCE_EXHAUSTED")
        and error.count("\n") == 1
    )


@dataclass(frozen=True)
class Paths:
    """Arguments that are paths, and one that is not."""

    positional: Annotated[PathName, tyro.conf.Positional]
    out: PathName
    cache: PathName | None = None
    several: tuple[PathName, ...] = ()
    text: str = "~"
    data: DataConfig = DataConfig(source="folder", path="~/images")


def test_the_home_folder_is_expanded_in_paths_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    flags = ["--out=~/x", "--cache", "~/y", "--text=~/z", "--several", "~/a", "b"]
    paths = parse(Paths, ["~", *flags])
    assert paths.several == ("/home/somebody/a", "b")
    assert (paths.positional, paths.out, paths.cache, paths.text) == (
        "/home/somebody",
        "/home/somebody/x",
        "/home/somebody/y",
        "~/z",
    )
    assert paths.data.path == "/home/somebody/images" and paths.data.held_out is None


@pytest.mark.parametrize("place", ["s3://bucket/x", "hf://owner/name", "https://host/x"])
def test_unsupported_schemes(place):
    with pytest.raises(
        UserError, match=f"^{place} is neither a local path nor one under gs://; fetch it first"
    ):
        parse(Paths, ["x", "--out", "y", "--cache", place])


def test_google_storage_without_its_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^gs://bucket/x needs a library .*bitdance_jax\[gcs\]"):
        parse(Paths, ["x", "--out", "gs://bucket/x"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert parse(Paths, ["x", "--out", "gs://bucket/x"]).out == "gs://bucket/x"


def strings(config, prefix=""):
    """The fields of a command's arguments that are strings but not paths, nested ones included."""
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        kinds = [hint, *typing.get_args(hint)]
        classes = (kind for kind in kinds if isinstance(kind, type))
        if nested := next(filter(dataclasses.is_dataclass, classes), None):
            yield from strings(nested, f"{prefix}{name}.")
        elif str in kinds and typing.get_origin(hint) is not Annotated:
            yield prefix + name


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("app.serve", {"host", "names"}),
        ("cli.convert", set()),
        (
            "cli.tokenize",
            {
                "captioned.captions",
                "captioned.held_out_field",
                "data.dataset",
                "data.held_out_field",
                "hosts.coordinator",
            },
        ),
        ("cli.evaluate", set()),
        ("cli.prompts", {"name", "size"}),
        ("cli.sample", {"negative_prompt", "size"}),
        ("cli.sweep", {"guidance", "head_steps"}),
        ("cli.plan", {"topology"}),
        ("cli.toy_text_to_image", set()),
    ],
)
def test_the_paths_of_a_command_have_the_type_of_paths(module, others):
    assert set(strings(importlib.import_module(f"bitdance_jax.{module}").Arguments)) == others


def test_the_paths_of_a_training_config_have_the_type_of_paths():
    others = {"data.dataset", "data.held_out_field", "hosts.coordinator"}
    assert set(strings(ClassConditionalTraining)) == others


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "command"),
    [
        ("cuda", ["sample.py"]),
        ("abacus", ["train.py", "emoji_tokenizer"]),
    ],
)
def test_a_missing_device_is_one_line(tmp_path, platform, command):
    root = Path(__file__).parents[2]
    command = [str(root / word) if word.endswith(".py") else word for word in command]
    environment = processes.environment() | {"JAX_PLATFORMS": platform}
    process = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith(
        f"error: there is no device of JAX_PLATFORMS={platform} ("
    )


@pytest.mark.parametrize(
    "command",
    [["sample.py"], ["train.py"], ["-m", "bitdance_jax.evaluate"], ["-m", "bitdance_jax", "app"]],
    ids=lambda command: command[-1],
)
def test_ctrl_c_during_the_imports(tmp_path, command):
    """jax.py is imported early in all of them; this one waits to be interrupted."""
    (tmp_path / "jax.py").write_text(
        "import pathlib, time\npathlib.Path('waiting').touch()\ntime.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    command = [str(root / word) if word.endswith(".py") else word for word in command]
    environment = processes.environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "waiting").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (-signal.SIGINT, "")  # for the shell 130


def test_after_the_imports_ctrl_c_is_an_exception_again():
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert run(lambda: signal.raise_signal(signal.SIGINT)) == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_failed_writes_that_follow_another_are_not_reported(caplog):
    """TensorStore's, which fail with the first one; Orbax raises that."""
    assert run(lambda: 0) == 0
    for message in ("Future exception was never retrieved\nfuture: <Future>", "something else"):
        logging.getLogger("asyncio").error(message)
    assert [record.getMessage() for record in caplog.records] == ["something else"]
