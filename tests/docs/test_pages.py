"""README and docs: links and paths exist, commands parse, and the Python examples run."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import quick_examples

from bitdance_jax.cli import plan, sample
from bitdance_jax.cli.flags import parse
from bitdance_jax.cli.main import COMMANDS
from bitdance_jax.distributed import multihost
from bitdance_jax.errors import UserError
from bitdance_jax.io import model_lookup
from bitdance_jax.io.model_lookup import EMBEDDED_CLASSES
from bitdance_jax.pipelines import toy_text_to_image


ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FOLDERS = ("bitdance_jax", "benchmarks", "docs", "examples", "notebooks", "tests")
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^ *```{language}\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE
    )


def code_spans(page: Path) -> list[str]:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `bitdance` command of a page."""
    lines = [span for span in code_spans(page) if span.startswith("bitdance ")]
    for block in blocks(page, "bash"):
        lines += block.replace("\\\n", " ").splitlines()
    found = [re.match(r"\s*(?:srun )?bitdance (.*)", line) for line in lines]
    # gs:// needs a package that the tests do without.
    return [shlex.split(match[1].replace("gs://", ""), comments=True) for match in found if match]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@every_page
def test_links_exist(page):
    links = re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@every_page
def test_named_files_and_modules_exist(page):
    missing = []
    for span in code_spans(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w/.]+", span) and not (ROOT / span).exists():
            missing.append(span)
        elif re.fullmatch(r"bitdance_jax(\.\w+)+", span) and not resolves(span):
            missing.append(span)
    assert not missing


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    path, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(path), attribute) or bool(
            importlib.import_module(name)
        )
    except ModuleNotFoundError:
        return False


class Parsed(Exception):
    """The flags of a command are all read."""


@every_page
def test_commands_parse(page, monkeypatch):
    for name, *flags in commands(page):
        assert name in (*COMMANDS, "--help", "--version"), f"bitdance {name}"
        if not flags or "--help" in flags:  # the name of the command in a sentence
            continue
        try:
            read_flags(name, flags, monkeypatch)
        except UserError as error:
            pytest.fail(f"bitdance {name} {shlex.join(flags)}: {error}")


def test_labels_are_classes_of_the_embedded_model():
    known = model_lookup.read_config(EMBEDDED_CLASSES).metadata["class_names"]
    labels: set[str] = set()
    for page in PAGES:
        for name, *flags in commands(page):
            if name == "sample" and "--checkpoint" not in flags and "--help" not in flags:
                labels |= set(parse(sample.Arguments, flags).labels or ())
    assert labels
    assert not {label for label in labels if not label.isdecimal()} - set(known)


def read_flags(name: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises a UserError where the command would refuse them."""

    def stop(*_: object) -> None:
        raise Parsed

    module = importlib.import_module(COMMANDS[name].module)
    if name not in ("train", "plan"):
        parse(module.Arguments, flags)
        return
    if re.fullmatch(r"[A-Z]+(\.py)?|my_file\.py", flags[0]):  # a placeholder
        flags[0] = "emoji_4x"
    monkeypatch.setattr(sys, "argv", ["bitdance", *flags])
    monkeypatch.setattr(multihost, "initialize", stop)  # the first step of train after its flags
    monkeypatch.setattr(plan, "find_devices", stop)
    with pytest.raises(Parsed):
        module.main()


PYTHON = [page for page in PAGES if blocks(page, "python") and page.name != "extending.md"]


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_examples_run(page, tmp_path, monkeypatch):
    """With small text-to-image models in place of others, and 2 steps of the head.

    The examples of a page continue each other.
    """
    monkeypatch.chdir(tmp_path)
    toy_text_to_image.save("models/14b_64x", toy_text_to_image.config(4))
    quick_examples.make_quick(monkeypatch, tmp_path)
    code = "\n".join(blocks(page, "python")).replace("1024x1024", "64x64")
    code = code.replace("head_steps=50", "head_steps=2")
    exec(compile(code, page, "exec"), {})
