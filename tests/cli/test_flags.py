"""The names of fields in messages are printed as this command's flags."""

import importlib
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import tyro

from bitdance_jax.cli import sample
from bitdance_jax.cli.config_file import load_config
from bitdance_jax.cli.flags import parse, with_flags
from bitdance_jax.cli.main import COMMANDS
from bitdance_jax.config import MeshConfig
from bitdance_jax.config.plain import Config, PathName
from bitdance_jax.errors import ConfigError, FileError, UserError


@dataclass(frozen=True)
class Inner(Config):
    ch_mult: tuple[int, ...] = (1,)
    cache: bool = True


@dataclass(frozen=True)
class Data(Config):
    path: PathName | None = None
    paths: tuple[PathName, ...] = ()


@dataclass(frozen=True)
class Files(Config):
    data: Data = Data()


@dataclass(frozen=True)
class Arguments(Config):
    """Arguments of all kinds."""

    ALIASES: ClassVar[dict[str, str]] = {"images_per_prompt": "per_prompt"}

    source: Annotated[str, tyro.conf.Positional] = "x"
    out: str = "x"
    batch_size: int = 1
    per_prompt: int = 1
    force: bool = False
    weights: str | None = None
    data: Inner = Inner()
    mesh: MeshConfig = MeshConfig()


@pytest.fixture(autouse=True)
def known():
    parse(Arguments, [])


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (ConfigError("batch_size must be 1", "batch_size"), "--batch-size must be 1"),
        (ConfigError("mesh.tensor of mesh.", "mesh.tensor"), "--mesh.tensor of mesh."),
        (ConfigError("out must be a file", "out"), "--out must be a file"),
        (ConfigError("out[0] must be a file", "out[0]"), "--out[0] must be a file"),
        (ConfigError("a source is empty", "source"), "a source is empty"),
        (ConfigError("source is empty", "source"), "SOURCE is empty"),
        (FileError("a/out exists; force=True", "a/out"), "a/out exists; --force"),
        (UserError("try weights='int8', batch_size=1."), "try --weights int8, --batch-size 1."),
        (UserError("set data.ch_mult=(1, 2, 4)"), "set --data.ch-mult 1 2 4"),
        (UserError("set data.cache=False"), "set --data.no-cache"),
        (UserError("images_per_prompt must be 1"), "--per-prompt must be 1"),
        (UserError("the out/batch_size.txt is empty"), "the out/batch_size.txt is empty"),
        (UserError("give --batch-size"), "give --batch-size"),
    ],
)
def test_with_flags(error, printed):
    assert with_flags(error) == printed


def test_a_config_in_the_arguments_has_its_full_name():
    with pytest.raises(ConfigError, match=r"^--mesh\.data .*") as caught:
        parse(Arguments, ["--mesh.data", "0"])
    assert caught.value.field == "mesh.data"


def test_a_model_without_its_flag():
    with pytest.raises(ConfigError, match="if it is a model, give --checkpoint runs/mine "):
        parse(sample.Arguments, ["runs/mine"])


def test_an_empty_path():
    with pytest.raises(ConfigError) as caught:
        parse(Files, ["--data.path", ""])
    assert with_flags(caught.value) == "--data.path is empty; name a path"
    with pytest.raises(ConfigError) as caught:
        parse(Files, ["--data.paths", "photos", ""])
    assert with_flags(caught.value) == "--data.paths is empty; name a path"


@pytest.mark.parametrize("name", ["sample", "tokenize", "serve", "emoji_tokenizer", "emoji_4x"])
def test_every_flag_has_a_description(name, capsys):
    if name in COMMANDS:
        arguments, default = importlib.import_module(COMMANDS[name].module).Arguments, None
    else:
        default, _ = load_config(name, [])
        arguments = type(default)
    with pytest.raises(SystemExit):
        parse(arguments, ["--help"], default)
    text = " ".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())
    assert len(re.findall(r"--[\w.-]+", text)) > 5
    value = r"(?:[A-Z]+|\{[^()]*?\}\S*)"
    assert not re.findall(rf"(--[\w.-]*\w)(?: {value})? +\(default", text)
