"""`bitdance`: its help, and how it starts and names its subcommands."""

import re
import runpy
import subprocess
import sys

import processes
import pytest

from bitdance_jax.cli import main as main_module
from bitdance_jax.cli.main import COMMANDS, main
from bitdance_jax.version import __version__


@pytest.fixture
def bitdance(monkeypatch, capsys):
    def bitdance(*arguments):
        monkeypatch.setattr(sys, "argv", ["bitdance", *arguments])
        return main(), *capsys.readouterr()

    return bitdance


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(bitdance, arguments):
    status, out, _ = bitdance(*arguments)
    assert status == 0
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 100


def test_version(bitdance):
    assert bitdance("--version") == (0, f"bitdance {__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "nearest"), [("smaple", "sample"), ("evaluate_prompts", "evaluate-prompts")]
)
def test_an_unknown_command_names_the_nearest(bitdance, name, nearest):
    status, _, error = bitdance(name)
    assert status == 2
    assert error.count("\n") == 1
    assert f"did you mean {nearest}?" in error


def test_a_command_gets_its_flags_and_its_name(bitdance, monkeypatch):
    started = []
    monkeypatch.setattr(main_module, "start", lambda name: started.append(name) or 3)
    status, *_ = bitdance("plan", "emoji_4x", "--top", "3")
    assert (status, started, sys.argv[1:]) == (3, ["plan"], ["emoji_4x", "--top", "3"])


def test_the_help_imports_no_subcommand():
    code = "import sys; from bitdance_jax.cli.main import main; sys.argv[1:] = []; main(); "
    code += "assert not {'jax', 'flax', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=processes.environment())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bitdance", name, "--help"])
    with pytest.raises(SystemExit) as stop:
        sys.exit(main())
    assert not stop.value.code
    assert f"bitdance {name}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_package_is_the_command(tmp_path):
    """`python -m bitdance_jax NAME`."""
    assert "bitdance plan" in processes.python(["-m", "bitdance_jax", "plan", "--help"], tmp_path)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("app", "app"),
        ("convert", "convert"),
        ("data.tokenize", "tokenize"),
        ("evaluate", "evaluate"),
        ("evaluate.prompts", "evaluate-prompts"),
        ("evaluate.sweep", "sweep"),
        ("plan", "plan"),
        ("toy_text_to_image", "toy-text-to-image"),
    ],
)
def test_every_entry_module_starts_its_command(module, name, monkeypatch):
    assert name in COMMANDS
    monkeypatch.setattr(main_module, "start", lambda name: f"started {name}")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"bitdance_jax.{module}", run_name="__main__")
    assert stop.value.code == f"started {name}"
